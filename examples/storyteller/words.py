"""The words that stories are made of. Lists are split at blanks; _ stands for a blank within one."""


def words(text):
    return [w.replace("_", " ") for w in text.split()]


GIRLS = words("""
Ada Alma Amy Anna Aria Bella Betty Bonnie Cara Clara Cora Daisy Dora Edith Ella Elsa Emma Esther Etta Eva
Faye Flora Freya Gina Grace Greta Hanna Hazel Heidi Helen Ida Ines Iris Ivy Jane Jenny Jill Josie Julia June
Karin Katie Kira Lara Laura Lena Lila Lily Linda Lisa Lola Lotta Lucy Luna Mabel Maggie Mara Maria Martha Mary
Maya Mia Milly Mina Molly Nadia Nell Nina Nora Olga Olive Paula Pearl Penny Petra Polly Rita Rosa Rose Ruby
Ruth Sally Sara Selma Sofia Stella Susie Tara Tess Thea Tilly Ursula Vera Viola Wanda Willa Wilma Zara Zoe
""")

BOYS = words("""
Adam Albert Alex Anton Arlo Arthur Axel Ben Benny Bert Bill Bob Boris Bruno Carl Charlie Chris Clem Colin Conrad
Dan David Dean Dick Dennis Eddie Edgar Eli Emil Eric Ernie Felix Finn Frank Fred Gabe Gary George Gus Hank
Hans Harry Henry Herman Hugo Ian Igor Jack Jacob James Jasper Jim Joe Joel John Jonas Karl Kevin Kurt Larry Lars
Leo Leon Levi Linus Louis Lucas Luke Magnus Marc Mark Martin Max Micah Mike Milo Ned Nick Nils Noah Olaf Oscar
Otto Owen Pablo Patrick Paul Pete Peter Phil Piet Ralph Ray Robin Roger Rolf Ron Rudi Sam Simon Stan Sven Ted
Theo Tim Toby Tom Tony Victor Walter Wes Will Zack
""")

ANIMALS = words("""
badger bear beaver bee beetle blackbird bumblebee bunny butterfly calf camel canary cat caterpillar chick chicken
chipmunk cow crab cricket crocodile crow deer dog dolphin donkey dove dragonfly duck duckling eagle elephant
ferret firefly fish flamingo foal fox frog gecko giraffe goat goldfish goose grasshopper hamster hare hawk hedgehog
hen heron horse kangaroo kitten koala ladybird lamb lark lion lizard llama lobster magpie mole monkey moose moth
mouse mule newt nightingale octopus ostrich otter owl ox panda parrot peacock pelican penguin pig pigeon piglet
pony puppy rabbit raccoon rat raven reindeer robin rooster salamander seagull seahorse seal sheep shrew skunk sloth
snail sparrow spider squid squirrel starfish stork swallow swan tiger toad tortoise turkey turtle vole walrus weasel
whale wolf woodpecker worm wren yak zebra
""")

# Short names that animals and toys go by.
PETS = words("""
Biscuit Blossom Bramble Bubbles Button Caramel Cinnamon Clover Cookie Crumb Dot Fern Fidget Flicker Fluff Ginger
Honey Jingle Jolly Juniper Marble Mitten Mocha Muffin Nettle Nibble Nutmeg Patch Peach Pebble Pepper Pickle Pip Pixie
Plum Poppy Pudding Pumpkin Puzzle Rascal Rusty Scout Shadow Smoky Snowy Socks Speckle Spot Sprout Star Sunny Tansy
Teasel Thistle Thunder Tiny Toffee Truffle Twig Velvet Waffle Whisker Wiggle Willow Ziggy
""")

ELDERS = words("""
baker blacksmith bookseller bus_driver butcher captain carpenter clockmaker cobbler cook dentist doctor farmer
ferryman fireman fisherman forester gardener glassblower goldsmith hunter innkeeper judge king knight librarian
lighthouse_keeper mailman mayor merchant miller miner musician nurse painter pilot plumber poet policeman postman
potter prince queen sailor shepherd shoemaker singer stonemason storyteller tailor teacher toymaker watchman weaver
wizard woodcutter
""")

KIN = words("grandmother grandfather mother father aunt uncle sister brother cousin neighbour")

TEMPERS = words("""
brave bright careful cheerful clever clumsy curious dreamy eager fearless friendly funny gentle greedy grumpy happy
helpful honest impatient kind lazy lively lonely loyal merry messy modest naughty noisy patient playful polite proud
quick quiet restless serious shy silly sleepy stubborn thoughtful timid wild wise
""")

SIZES = words("big enormous fat giant great huge large little plump short slim small tall thin tiny")

COLOURS = words("""
amber beige black blue bronze brown copper cream crimson emerald golden green grey indigo ivory lemon lilac orange
pink purple red rosy scarlet silver turquoise violet white yellow
""")

# Looks of things: of new ones, and of those that may have been through something.
FINE = words("""
beautiful bright_new fancy fine glittering handmade light lovely lucky magic polished precious pretty shiny soft striped
warm wonderful wooden woollen
""")
WORN = words("""
crooked dented dusty funny-looking heavy old patched plain rusty simple spotted squeaky sticky strange worn
""")

THINGS = words("""
accordion apron ball balloon banjo basket bell bicycle blanket boat book bottle bow bowl box bracelet broom brush
bucket cap candle cane cape card cart chain chest clock coat coin comb compass cradle crown cup cushion diary dish
doll drum dress feather fiddle flag flute fork glass globe guitar hammer handkerchief harp hat helmet hook horn
jacket jar jewel jug kettle key kite knife ladder lamp lantern letter lid lute magnet map marble mask mirror mitten
mug nail necklace needle net notebook oar pan parcel pen pencil picture pillow pin pipe pot puppet purse quilt rake
rattle ribbon ring rocking_horse rope saddle sail saw scarf scooter sewing_box shawl shell shield shirt shovel skirt
sled spade spoon spinning_top stamp stool stone suitcase sweater sword table_lamp teapot telescope thimble toolbox
toy_train tray trumpet trunk umbrella vase vest violin waistcoat walking_stick wallet watch watering_can wheel
wheelbarrow whistle windmill xylophone yo-yo
""")

PAIRS = words("""
boots gloves glasses mittens sandals scissors shoes skates slippers socks stilts trousers tongs
""")

FOODS = words("""
apple_pie bacon bananas beans berries biscuits blueberries bread bread_rolls broth buns butter buttermilk cabbage
cake candy carrots cauliflower cheese cherries chestnuts chocolate cocoa cookies corn crackers cranberries cream_puffs
cucumbers custard dates dumplings eggs figs fritters fudge garlic grapes gravy ham hazelnuts honey_cake ice_cream jam
jelly leek_soup lemonade lentils lettuce marmalade melons milk mushrooms mustard noodles nuts oatcakes oats omelette
onions oranges pancakes parsley pasta peaches peanuts pears peas pickles pie pineapple plums popcorn porridge potatoes
pretzels radishes raisins raspberries rhubarb rice salad sandwiches sausages scones spinach stew strawberries sugar syrup
tea toast tomatoes turnips walnuts yoghurt
""")

# Where a story happens: preposition and name.
PLACES = [tuple(p.split(":")) for p in words("""
in:attic on:balcony in:bakery in:barn on:beach under:bridge in:cabin in:canyon in:castle in:cave in:cellar on:cliff
in:cottage in:courtyard on:deck in:desert at:dock in:field in:forest by:fountain in:garden by:gate in:glade on:farm
in:greenhouse in:hall in:harbour by:hedge on:hill in:hut on:island in:jungle in:kitchen by:lake in:library
in:lighthouse in:marsh at:market in:meadow by:mill in:mountains in:museum in:orchard in:palace in:park on:path
by:pond in:pasture on:pier in:playground by:river on:roof in:school in:shed at:shore in:stable at:station by:stream
in:street in:swamp in:tent in:theatre in:tower in:town in:tunnel in:valley in:village in:vineyard by:waterfall
by:well in:wood in:workshop on:yard_wall in:zoo
""")]

TREES = words("""
alder apple_tree ash aspen beech birch cedar cherry_tree chestnut_tree cypress elm fir fig_tree hawthorn hornbeam larch
lime_tree maple oak olive_tree palm pear_tree pine plum_tree poplar rowan spruce sycamore walnut_tree willow_tree yew
""")

FLOWERS = words("""
asters bluebells buttercups carnations cornflowers cowslips crocuses daffodils dahlias dandelions forget-me-nots foxgloves
geraniums hyacinths lavender lilies marigolds orchids pansies peonies petunias primroses roses snowdrops sunflowers
tulips violets wallflowers
""")

WEATHERS = words("""
bright_and_sunny calm_and_mild cloudy cold_and_clear cool damp_and_grey dark_and_stormy dry_and_hot foggy freezing
frosty gloomy icy misty pleasant rainy snowy_and_still stormy sunny warm_and_still wet windy
""")

TIMES = words("""
morning afternoon evening night day Monday Tuesday Wednesday Thursday Friday Saturday Sunday spring_morning
summer_afternoon autumn_evening winter_night
""")

ADVERBS = words("""
angrily anxiously awkwardly boldly bravely brightly briskly calmly carefully cautiously cheerfully clumsily curiously
eagerly faintly firmly gently gladly gratefully happily hastily helplessly honestly hopefully hurriedly joyfully kindly
lazily loudly merrily nervously noisily patiently playfully politely proudly quickly quietly sadly shyly silently
sleepily slowly softly solemnly steadily stubbornly suddenly thoughtfully timidly warmly wearily wildly wisely
""")

FEELINGS = words("breathless calm confident exhausted hoarse hopeful hungry ready sore thirsty tired")

# Activities: "liked to ..." and "was ...ing".
HOBBIES = [tuple(h.replace("_", " ").split("|")) for h in """
bake_bread|baking_bread build_towers|building_towers catch_butterflies|catching_butterflies chase_leaves|chasing_leaves
climb_trees|climbing_trees collect_pebbles|collecting_pebbles count_the_stars|counting_the_stars
dance_in_the_rain|dancing_in_the_rain dig_holes|digging_holes draw_maps|drawing_maps feed_the_birds|feeding_the_birds
fly_a_kite|flying_a_kite gather_acorns|gathering_acorns hum_old_tunes|humming_old_tunes hop_over_puddles|hopping_over_puddles
invent_games|inventing_games juggle_apples|juggling_apples knit_scarves|knitting_scarves
listen_to_the_wind|listening_to_the_wind look_at_pictures|looking_at_pictures make_paper_boats|making_paper_boats
mend_old_toys|mending_old_toys paint_landscapes|painting_landscapes pick_flowers|picking_flowers
plant_seeds|planting_seeds play_hide-and-seek|playing_hide-and-seek play_the_flute|playing_the_flute
read_stories|reading_stories ride_down_the_hill|riding_down_the_hill roll_in_the_grass|rolling_in_the_grass
row_across_the_water|rowing_across_the_water sail_toy_ships|sailing_toy_ships sing_songs|singing_songs
skip_stones|skipping_stones slide_on_the_ice|sliding_on_the_ice solve_riddles|solving_riddles
splash_in_the_water|splashing_in_the_water sweep_the_floor|sweeping_the_floor swim_in_the_pond|swimming_in_the_pond
swing_on_a_branch|swinging_on_a_branch tell_jokes|telling_jokes tend_the_vegetables|tending_the_vegetables
watch_the_clouds|watching_the_clouds water_the_plants|watering_the_plants weave_baskets|weaving_baskets
whistle_a_melody|whistling_a_melody write_letters|writing_letters
""".split()]

# What is heard when something falls, and what in the night.
CRASHES = words("bang boom clang clatter clunk crack crash creak crunch pop rattle splash splat squeak thud thump")
SOUNDS = words("""
clatter click crackling creak drip gurgle growl hiss howl hum knock murmur rattling_noise roar rumble rustle scratching
sigh snap snore squeak thud tick whimper whisper
""")

HIDING = words("""
behind_the_curtain behind_the_door behind_the_stove between_two_stones in_a_drawer in_a_hollow_log in_the_bushes
in_the_chimney in_the_cupboard in_the_ditch in_the_hay in_the_high_grass in_the_laundry in_the_mud in_the_pantry
in_the_sand in_the_wardrobe in_the_woodpile inside_a_boot on_the_shelf on_the_windowsill under_a_leaf under_a_stone
under_the_bed under_the_bench under_the_carpet under_the_roots under_the_sofa under_the_stairs under_the_table
""")

# What may be done with a tool when something is broken: hard things, and things made of cloth.
TOOLS = {
    "glue": "glued the pieces together", "a hammer and nails": "nailed {it} together",
    "a drop of oil": "oiled the stiff part", "a piece of wire": "bound {it} with wire",
    "some wax": "sealed the crack with wax", "a strong screw": "screwed {it} together",
    "a strip of leather": "tied a strip of leather around the crack",
    "fresh paint": "painted over the scratches",
}
SEWING = {
    "a needle and thread": "stitched the tear shut", "a patch": "sewed a patch over the hole",
    "a bit of string": "laced {it} with string", "some wool": "darned the hole with wool",
    "a safety pin": "pinned {it} together",
}
CLOTH = words("""
apron blanket cap cape coat cushion dress flag handkerchief hat jacket mitten pillow puppet purse quilt ribbon
sail scarf shawl shirt skirt sweater vest waistcoat wallet gloves mittens sandals shoes slippers socks trousers
boots
""")

# What is learned, by plot.
LESSONS = {plot: [lesson.replace("_", " ") for lesson in lessons.split()] for plot, lessons in {
    "lost": """what_is_lost_can_often_be_found many_hands_make_light_work every_cloud_has_a_silver_lining
        patience_is_stronger_than_anger""",
    "broken": """good_things_take_time many_hands_make_light_work what_is_broken_can_be_mended
        patience_is_stronger_than_anger""",
    "stuck": """asking_for_help_is_not_a_weakness a_friend_in_need_is_a_friend_indeed
        the_smallest_creature_can_be_the_bravest whoever_helps_others_is_never_alone""",
    "storm": """every_cloud_has_a_silver_lining kindness_comes_back_in_the_end
        a_friend_in_need_is_a_friend_indeed""",
    "hungry": """it_is_better_to_share_than_to_keep kindness_comes_back_in_the_end
        whoever_helps_others_is_never_alone""",
    "contest": """a_true_friend_is_worth_more_than_a_prize small_steps_lead_up_high_mountains
        trying_again_is_half_of_winning little_by_little_one_travels_far""",
    "gift": """honest_words_weigh_more_than_gold good_things_take_time those_who_listen_learn_the_most""",
    "secret": """courage_grows_when_it_is_needed those_who_listen_learn_the_most
        a_stranger_is_a_friend_whom_you_do_not_know_yet""",
}.items()}

NUMBERS = words("two three four five six seven eight nine ten eleven twelve twenty")

REWARDS = words("""
a_bag_of_sweets a_basket_of_fruit a_big_hug a_bunch_of_flowers a_crown_of_leaves a_cup_of_hot_chocolate a_gold_coin
a_jar_of_honey a_kiss_on_the_cheek a_new_song a_pat_on_the_back a_ride_on_the_wagon a_slice_of_cake a_warm_blanket
""")

DANGERS = words("""
a_dark_cloud a_fierce_wind a_flash_of_lightning a_gust_of_wind a_hailstorm a_rolling_barrel a_swarm_of_wasps a_wave
""")

STUMBLES = words("""
a_broken_step a_bucket_of_water a_deep_hole a_fallen_branch a_heap_of_leaves a_loose_plank a_molehill a_patch_of_ice
a_rake a_root a_slippery_rock a_thorny_bush a_trailing_rope
""")

KINDLY = words("""
brightly calmly cheerfully eagerly gently gladly gratefully happily honestly hopefully joyfully kindly merrily
patiently politely proudly softly solemnly thoughtfully warmly wisely
""")
SADLY = words("anxiously faintly helplessly nervously quietly sadly shyly softly timidly wearily")

SAD = words("""
afraid anxious confused disappointed frightened helpless lonely miserable nervous sad unhappy upset weary worried
""")
GLAD = words("cheerful delighted glad grateful happy joyful pleased relieved thankful")
