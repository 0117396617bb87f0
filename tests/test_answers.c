// Answers taken apart: what comes out of answers of all families, however they are cut, also where
// they are broken or end too early. An answer's transcript is one text: R reasoning, C content,
// N name, I id, A arguments of a call and E with its validity, with bars between them.
#include <dirent.h>
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "meter.h"

// The letter Q stands in no mark and is never dropped: where an answer ends too early all of them
// must come out.
#define TOOLS \
    "{\"messages\": [], \"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"look\"," \
    "\"parameters\": {\"type\": \"object\", \"properties\": {\"town\": {\"type\": \"string\"}," \
    "\"n\": {\"type\": \"integer\"}, \"flag\": {\"type\": \"boolean\"}," \
    "\"o\": {\"type\": \"object\", \"properties\": {\"x\": {\"type\": \"array\", \"items\":" \
    "{\"type\": \"number\"}}, \"z\": {\"type\": \"object\"}}}," \
    "\"any\": {\"type\": [\"number\", \"string\"]}}}}}," \
    "{\"name\": \"add\", \"parameters\": {\"properties\": {\"a\": {\"type\": \"number\"}}}}]}"

typedef struct answer {
    const char *form, *prompt, *text, *transcript;
} answer;

#define BAR "\357\275\234"
#define LOW "\342\226\201"
#define M3 "]<]minimax[>["
#define DSML BAR "DSML" BAR
#define E_ACUTE "\303\251"

static const answer answers[] = {
    // what most templates have: <think>, <tool_call> with JSON
    {"usual", "", "Hello Q!", "C Hello Q!"},
    {"usual", "", "", ""},
    {"usual", "", "\n\n", ""},
    {"usual", "", "<think>\nQ1\n\nQ2\n</think>\n\n Yes Q.\n", "R Q1\n\nQ2|C Yes Q."},
    {"usual", "<think>\n", "Q1\n</think>\n\nYes", "R Q1|C Yes"},
    {"usual", "<think>\n\n</think>\n\n", "Yes", "C Yes"},
    {"usual", "<think>", "never Q closed", "R never Q closed"},
    {"usual", "", "</think>Yes", "C Yes"},
    {"usual", "", "a <think> b </think> c <thin", "C a <think> b </think> c <thin"},
    {"usual", "", "</thin Q", "C </thin Q"},
    {"usual", "",
     "Look:\n<tool_call>\n{\"name\": \"look\", \"arguments\": {\"town\": \"So\\\"Q\\n\"}}\n"
     "</tool_call>",
     "C Look:|N look|A {\"town\": \"So\\\"Q\\n\"}|E1"},
    {"usual", "",
     "<think>Q</think>\n<tool_call>{\"name\": \"look\", \"arguments\": {\"o\": {\"x\": [1, {}, "
     "[]]}, \"Q\": null}}</tool_call>\n<tool_call>\n{\"name\": \"add\", \"arguments\": "
     "{}}\n</tool_call><|im_end|>\n",
     "R Q|N look|A {\"o\": {\"x\": [1, {}, []]}, \"Q\": null}|E1|N add|A {}|E1"},
    {"usual", "",
     "<tool_call>{\"arguments\": {\"a\": \"Q\"}, \"name\": \"add\"}</tool_call>",
     "N add|A {\"a\": \"Q\"}|E1"},
    {"usual", "",
     "<tool_call>{\"name\": \"add\", \"arguments\": \"{\\\"a\\\": \\\"Q\\\\n\\\\u00e9\\\"}\"}"
     "</tool_call>",
     "N add|A {\"a\": \"Q\\n\\u00e9\"}|E1"},
    {"usual", "",
     "<tool_call>{\"name\": \"add\", \"arguments\": \"{\\\"a\\\": Q\"}</tool_call>x",
     "N add|A {\"a\": Q|E0|C x"},
    {"usual", "", "<tool_call>{\"name\": \"add\"}</tool_call>", "N add|A {}|E1"},
    {"usual", "", "<tool_call>{\"name\": \"add\", \"arguments\": null}</tool_call>",
     "N add|A {}|E1"},
    {"usual", "", "<tool_call>{\"name\": \"add\", \"parameters\": [1]}</tool_call>",
     "N add|A [1]|E0"},
    {"usual", "", // a brace is missing
     "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}</tool_call>ok",
     "N add|A {\"a\": 1}|E1|C ok"},
    {"usual", "", // and here there is one too many
     "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}}</tool_call>ok",
     "N add|A {\"a\": 1}|E1|C }</tool_call>ok"},
    {"usual", "",
     "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": Q 'x'}}</tool_call>\nok",
     "N add|A {\"a\": Q 'x'}}|E0|C ok"},
    {"usual", "",
     "<tool_call>[{\"name\": \"add\", \"arguments\": {\"a\": 1}}, {\"type\": \"function\", "
     "\"function\": {\"name\": \"look\", \"arguments\": {}}, \"id\": \"Q7\"}]</tool_call>",
     "N add|A {\"a\": 1}|E1|N look|A {}|I Q7|E1"},
    {"usual", "", // what is no part of the call is content
     "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}, \"plan\": [\"Q\", 2], \"id\": "
     "null, \"type\": \"function\"}</tool_call>x",
     "N add|A {\"a\": 1}|C \"plan\": [\"Q\", 2]|E1|C x"},
    {"usual", "",
     "<tool_call>{\"plan\": \"Q\", \"arguments\": {\"a\": 1}, \"name\": \"add\", \"name\": \"Q\"}",
     "C \"plan\": \"Q\"|N add|A {\"a\": 1}|C \"name\": \"Q\"|E1"},
    {"usual", "", "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}", // whole for all that
     "N add|A {\"a\": 1}|E1"},
    {"usual", "", "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1",
     "N add|A {\"a\": 1|E0"},
    {"usual", "", "<tool_call>{\"name\": \"add\", \"Q\"", "N add|A \"Q\"|E0"},
    {"usual", "", "<tool_call>{\"name\": \"add\", \"arguments\": \"{\\u00Q", "N add|A {\\u00Q|E0"},
    {"usual", "<think>", "<think>R</think>C", "R R|C C"}, // written once more
    {"usual", "", "<tool_call>{\"name\": \"add\"}</tool_call>\n```c\nQ\n```", // not its fence
     "N add|A {}|E1|C ```c\nQ\n```"},
    {"usual", "", "Write <tool_call> and then Q.", "C Write <tool_call> and then Q."},
    {"usual", "", "<tool_call>{\"Q\": 1}</tool_call> x", "C <tool_call>{\"Q\": 1}</tool_call> x"},
    {"usual", "",
     "<tool_call> Q <tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 2e-1}}</tool_call>",
     "C <tool_call> Q|N add|A {\"a\": 2e-1}|E1"},
    {"usual", "", // in reasoning only tools are called
     "<think>a <tool_call>{\"name\": \"Qs\"}</tool_call> b\n<tool_call>\n{\"name\": \"add\", "
     "\"arguments\": {}}\n</tool_call>\nc</think>d",
     "R a <tool_call>{\"name\": \"Qs\"}</tool_call> b|N add|A {}|E1|R c|C d"},
    {"usual", "", "Bytes \377\376 <\303 " E_ACUTE "\n<|im_end|> Q",
     "C Bytes \377\376 <\303 " E_ACUTE "\n<|im_end|> Q"},
    {"usual", "", "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": \"\377\"}}</tool_call>",
     "N add|A {\"a\": \"\377\"}|E0"},
    // GLM, Laguna, Ling, Spark: keys and values
    {"usual", "<think>",
     "R Q\n</think>\nC\n<tool_call>look\n<arg_key>town</arg_key>\n<arg_value>So\"Q\n'" E_ACUTE
     "</arg_value>\n<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n<arg_key>o</arg_key>\n"
     "<arg_value>{\"x\": [1]}</arg_value>\n<arg_key>flag</arg_key>\n<arg_value>true</arg_value>\n"
     "</tool_call>\n<tool_call>add\n</tool_call></assistant>",
     "R R Q|C C|N look|A {\"town\": \"So\\\"Q\\n'" E_ACUTE
     "\", \"n\": 3, \"o\": {\"x\": [1]}, \"flag\": true}|E1|N add|A {}|E1"},
    {"usual", "</think>",
     "<tool_call>look<arg_key>any</arg_key><arg_value>Q7</arg_value><arg_key>new</arg_key>"
     "<arg_value> Q [</arg_value><arg_key>any</arg_key><arg_value> 5 </arg_value></tool_call>x",
     "N look|A {\"any\": \"Q7\", \"new\": \" Q [\", \"any\": 5}|E1|C x"},
    {"usual", "", "<tool_call>look Q\nx</tool_call>", "C <tool_call>look Q\nx</tool_call>"},
    // Hunyuan
    {"lines", "",
     "<think>Q</think>\n<answer>a</answer>\n<tool_calls>\n<tool_call>look\n```json\n{\"n\": 1}\n"
     "```</tool_call>\n<tool_call>add\n```json\n{}\n```</tool_call>\n</tool_calls>",
     "R Q|C a|N look|A {\"n\": 1}|E1|N add|A {}|E1"},
    {"lines", "", // MiniMax-M1
     "C\n<tool_calls>\n{\"name\": \"look\", \"arguments\": {\"town\": \"Q\"}}\n{\"name\": \"add\", "
     "\"arguments\": {\"a\": 1.5}}\n</tool_calls><end_of_sentence>\n",
     "C C|N look|A {\"town\": \"Q\"}|E1|N add|A {\"a\": 1.5}|E1"},
    {"lines", "", "The <tool_calls> Q mark", "C The <tool_calls> Q mark"},
    // Qwen3-Coder, Qwen3.5, Nemotron 3, StepFun
    {"qwen", "<think>\n",
     "R\n</think>\n\nC\n\n<tool_call>\n<function=look>\n<parameter=town>\nSo\"Q\n'" E_ACUTE
     "\n\n</parameter>\n<parameter=n>\n3\n</parameter>\n<parameter=o>\n{\"x\": [1]}\n</parameter>\n"
     "<parameter=flag>\nTrue\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>"
     "\n</function>\n</tool_call><|im_end|>",
     "R R|C C|N look|A {\"town\": \"So\\\"Q\\n'" E_ACUTE
     "\\n\", \"n\": 3, \"o\": {\"x\": [1]}, \"flag\": true}|E1|N add|A {}|E1"},
    {"qwen", "", // without <tool_call>; a value that holds the mark of its end
     "C <function=look>\n<parameter=town>\n<parameter>Q</parameter> </b>\n</parameter>\n"
     "</function>\n</tool_call>",
     "C C|N look|A {\"town\": \"<parameter>Q</parameter> </b>\"}|E1"},
    {"qwen", "", // an end is missing
     "<tool_call>\n<function=look>\n<parameter=town>\nQ\n</function>\n</tool_call>\nx",
     "N look|A {\"town\": \"Q\"}|E1|C x"},
    {"qwen", "",
     "<tool_call><function=look>stray Q<parameter=n>x Q</parameter></tool_call>",
     "C <tool_call><function=look>stray Q<parameter=n>x Q</parameter></tool_call>"},
    {"qwen", "",
     "<tool_call><function=look><parameter=n>x Q</parameter>stray Q</function></tool_call>",
     "N look|A {\"n\": \"x Q</parameter>stray Q\"}|E1"},
    {"qwen", "", "<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>", "N add|A {}|E1"},
    {"qwen", "", "<function=add>{\"a\": 7}</function>", "N add|A {\"a\": 7}|E1"},
    {"qwen", "", "#include <functional> <function=> Q", "C #include <functional> <function=> Q"},
    {"seed", "",
     "<seed:think>R</seed:think>\nC\n\n<seed:tool_call>\n<function=look>\n<parameter=town>\nQ"
     "</parameter>\n<parameter=o>{'x': [1, 'y', None], 'z': {}}</parameter>\n<parameter=flag>False"
     "</parameter>\n</function>\n</seed:tool_call><seed:eos>",
     "R R|C C|N look|A {\"town\": \"\\nQ\", \"o\": {\"x\": [1, \"y\", null], \"z\": {}}, \"flag\": "
     "false}|E1"},
    {"minicpm", "<think>\n",
     "R\n</think>\n\nC\n<function name=\"look\"><param name=\"town\"><![CDATA[a\n<b>Q]]></param>"
     "<param name=\"n\">3</param><param name=\"o\">{'x': [True]}</param></function>\n<function "
     "name=\"add\"></function><|im_end|>",
     "R R|C C|N look|A {\"town\": \"a\\n<b>Q\", \"n\": 3, \"o\": {\"x\": [true]}}|E1|N add|A "
     "{}|E1"},
    {"minimax2", "<think>\n",
     "R\n</think>\n\nC\n<minimax:tool_call>\n<invoke name=\"look\">\n<parameter name=\"town\">Q"
     "</parameter>\n<parameter name=\"n\">3</parameter>\n</invoke>\n<invoke name=\"add\">\n"
     "</invoke>"
     "\n</minimax:tool_call>[e~[",
     "R R|C C|N look|A {\"town\": \"Q\", \"n\": 3}|E1|N add|A {}|E1"},
    {"minimax3", "",
     "<mm:think>R</mm:think>C" M3 "<tool_call>\n" M3 "<invoke name=\"look\">" M3 "<town>Q\n" M3
     "</town>" M3 "<n>3" M3 "</n>" M3 "<o>" M3 "<x>" M3 "<item>1" M3 "</item>" M3 "<item>2" M3
     "</item>" M3 "</x>" M3 "<z>" M3 "</z>" M3 "</o>" M3 "</invoke>\n" M3 "<invoke name=\"add\">" M3
     "</invoke>\n" M3 "</tool_call>[e~[",
     "R R|C C|N look|A {\"town\": \"Q\\n\", \"n\": 3, \"o\": {\"x\": [1, 2], \"z\": {}}}|E1|N "
     "add|A "
     "{}|E1"},
    {"minimax3", "", // another element ends than has begun
     M3 "<tool_call>" M3 "<invoke name=\"look\">" M3 "<town>a" M3 "</Q>" M3 "</invoke>" M3
     "</tool_call>x",
     "N look|A {\"town\": a" M3 "</Q>" M3 "</invoke>|E0|C x"},
    {"minimax3", "", // text between elements
     M3 "<tool_call>" M3 "<invoke name=\"look\">" M3 "<n>1" M3 "</n>Q" M3 "</invoke>",
     "N look|A {\"n\": 1|C Q|A }|E1"},
    {"minimax3", "", "</mm:think>C" M3 "<tool_call>Q", "C C" M3 "<tool_call>Q"},
    {"dsml", "<think>",
     "R</think>C\n\n<" DSML "function_calls>\n<" DSML "invoke name=\"look\">\n<" DSML
     "parameter name=\"town\" string=\"true\">Q 1</" DSML "parameter>\n<" DSML
     "parameter name=\"x\" string=\"false\">[1]</" DSML "parameter>\n</" DSML "invoke>\n<" DSML
     "invoke name=\"add\">\n</" DSML "invoke>\n</" DSML "function_calls><" BAR "end" LOW "of" LOW
     "sentence" BAR ">",
     "R R|C C|N look|A {\"town\": \"Q 1\", \"x\": [1]}|E1|N add|A {}|E1"},
    {"dsml", "</think>",
     "<" DSML "tool_calls>\n<" DSML "invoke name=\"look\">\n<" DSML
     "parameter name=\"n\" string=\"true\">5Q</" DSML "parameter>\n</" DSML "invoke>\n</" DSML
     "tool_calls>",
     "N look|A {\"n\": \"5Q\"}|E1"},
    {"hy3", "<think:opensource>",
     "R</think:opensource>C<tool_calls:opensource>\n<tool_call:opensource>look<tool_sep:opensource>"
     "\n<arg_key:opensource>town</arg_key:opensource>\n<arg_value:opensource>Q"
     "</arg_value:opensource>\n</tool_call:opensource>\n<tool_call:opensource>add"
     "<tool_sep:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
     "R R|C C|N look|A {\"town\": \"Q\"}|E1|N add|A {}|E1"},
    {"kimi3", "<|open|>think<|sep|>",
     "R<|close|>think<|sep|><|open|>response<|sep|>C<|close|>response<|sep|><|open|>tools<|sep|>"
     "<|open|>call tool=\"look\" index=\"1\"<|sep|><|open|>argument key=\"town\" "
     "type=\"string\"<|sep|>Q\n<|close|>argument<|sep|><|open|>argument key=\"a&quot;b\" "
     "type=\"number\"<|sep|>3<|close|>argument<|sep|><|close|>call<|sep|><|open|>call tool=\"add\" "
     "index=\"2\"<|sep|><|open|>json type=\"object\"<|sep|>{\"a\": 1}<|close|>json<|sep|>"
     "<|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|><|end_of_msg|>",
     "R R|C C|N look|A {\"town\": \"Q\\n\", \"a\\\"b\": 3}|E1|N add|A {\"a\": 1}|E1"},
    // names, ids and arguments between marks
    {"deepseek", "<think>\n",
     "R\n</think>\n\nC<" BAR "tool" LOW "calls" LOW "begin" BAR "><" BAR "tool" LOW "call" LOW
     "begin" BAR ">function<" BAR "tool" LOW "sep" BAR ">look\n```json\n{\"town\": \"Q\"}\n```<" BAR
     "tool" LOW "call" LOW "end" BAR ">\n<" BAR "tool" LOW "call" LOW "begin" BAR ">function<" BAR
     "tool" LOW "sep" BAR ">add\n```json\n{}\n```<" BAR "tool" LOW "call" LOW "end" BAR "><" BAR
     "tool" LOW "calls" LOW "end" BAR "><" BAR "end" LOW "of" LOW "sentence" BAR ">",
     "R R|C C|N look|A {\"town\": \"Q\"}|E1|N add|A {}|E1"},
    {"deepseek", "</think>",
     "C<" BAR "tool" LOW "calls" LOW "begin" BAR "><" BAR "tool" LOW "call" LOW "begin" BAR ">look<"
     BAR "tool" LOW "sep" BAR ">{\"town\": \"Q\"}<" BAR "tool" LOW "call" LOW "end" BAR "><" BAR
     "tool" LOW "call" LOW "begin" BAR ">add<" BAR "tool" LOW "sep" BAR ">{Q}<" BAR "tool" LOW
     "call" LOW "end" BAR "><" BAR "tool" LOW "calls" LOW "end" BAR ">x",
     "C C|N look|A {\"town\": \"Q\"}|E1|N add|A {Q}|E0|C x"},
    {"kimi2", "",
     "<think>R</think>C<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
     "<|tool_call_argument_begin|>{\"town\": \"Q\"}<|tool_call_end|><|tool_call_begin|>"
     "functions.add:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
     "<|im_end|>",
     "R R|C C|N look|I functions.look:0|A {\"town\": \"Q\"}|E1|N add|I functions.add:1|A {}|E1"},
    {"kimi2", "", "<|tool_call_begin|>look Q", "C <|tool_call_begin|>look Q"},
    {"solar", "",
     "<|think|>R<|end|><|begin|>assistant<|content|>C<|end|><|begin|>assistant<|tool_calls|>"
     "<|tool_call:begin|>a1b2<|tool_call:name|>look<|tool_call:args|>{\"town\": \"Q\"}"
     "<|tool_call:end|><|tool_call:begin|>c3<|tool_call:name|>add<|tool_call:args|>{}"
     "<|tool_call:end|><|calls|>",
     "R R|C C|N look|I a1b2|A {\"town\": \"Q\"}|E1|N add|I c3|A {}|E1"},
    {"mistral", "",
     "C[TOOL_CALLS][{\"name\": \"look\", \"arguments\": {\"town\": \"Q\"}, \"id\": \"abc123xyz\"}, "
     "{\"name\": \"add\", \"arguments\": {}, \"id\": \"d\"}]",
     "C C|N look|A {\"town\": \"Q\"}|I abc123xyz|E1|N add|A {}|I d|E1"},
    {"mistral", "",
     "[THINK]R[/THINK]C[TOOL_CALLS]look[CALL_ID]abc123xyz[ARGS]{\"town\": \"Q\"}[TOOL_CALLS]add"
     "[ARGS]{}",
     "R R|C C|N look|I abc123xyz|A {\"town\": \"Q\"}|E1|N add|A {}|E1"},
    {"mistral", "", "see [TOOL_CALLS] Q and [ARGS]", "C see [TOOL_CALLS] Q and [ARGS]"},
    {"functionary2", ">>>",
     "all\nC >>> x Q\n>>>look\n{\"town\": \"Q\"}>>>add\n{\"a\": }<|eot_id|>",
     "C C >>> x Q|N look|A {\"town\": \"Q\"}|E1|N add|A {\"a\": }|E0"},
    {"functionary2", ">>>", "just Q text", "C just Q text"},
    {"functionary1", "", "C<function=look>{\"town\": \"Q\"}</function><function=add>{}</function>",
     "C C|N look|A {\"town\": \"Q\"}|E1|N add|A {}|E1"},
    // JSON behind a mark
    {"cohere", "<|START_THINKING|>",
     "R<|END_THINKING|><|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"look\", "
     "\"parameters\": {\"town\": \"Q\"}},\n    {\"tool_call_id\": 1, \"tool_name\": \"add\", "
     "\"parameters\": {}}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>",
     "R R|N look|I 0|A {\"town\": \"Q\"}|E1|N add|I 1|A {}|E1"},
    {"cohere", "<|START_THINKING|><|END_THINKING|>", "<|START_RESPONSE|>C Q<|END_RESPONSE|>",
     "C C Q"},
    {"command-r", "",
     "Plan Q\nAction:\n```json\n[\n    {\n        \"tool_name\": \"look\",\n        "
     "\"parameters\": {\"town\": \"Q\"}\n    },\n    {\"tool_name\": \"add\", \"parameters\": {}}\n"
     "]```\n",
     "C Plan Q|N look|A {\"town\": \"Q\"}|E1|N add|A {}|E1"},
    {"apertus", "",
     "<|inner_prefix|>R<|inner_suffix|>C<|tools_prefix|>[{\"look\": {\"town\": \"Q\"}}, {\"add\": "
     "{}}]<|tools_suffix|>",
     "R R|C C|N look|A {\"town\": \"Q\"}|E1|N add|A {}|E1"},
    {"granite3", "",
     "<think>R</think><response>C</response><|tool_call|>[{\"name\": \"look\", \"arguments\": "
     "{\"town\": \"Q\"}}, {\"name\": \"add\", \"arguments\": {}}]<|end_of_text|>",
     "R R|C C|N look|A {\"town\": \"Q\"}|E1|N add|A {}|E1"},
    {"gigachat", "", "C<|function_call|>{\"name\": \"look\", \"arguments\": {\"n\": "
     "1}}<|message_sep|>",
     "C C|N look|A {\"n\": 1}|E1"},
    {"gigachat", "",
     "C<|message_sep|>\n\nfunction call<|role_sep|>\n{\"name\": \"look\", \"arguments\": {\"n\": "
     "1}}<|message_sep|>\n\n",
     "C C|N look|A {\"n\": 1}|E1"},
    {"firefunction", "",
     "C functools[{\"name\": \"look\", \"arguments\": {\"town\": \"Q\"}}, {\"name\": \"add\", "
     "\"arguments\": {}}]",
     "C C|N look|A {\"town\": \"Q\"}|E1|N add|A {}|E1"},
    {"nemotron", "<think>\n",
     "R\n</think>\n\n<TOOLCALL>[{\"name\": \"look\", \"arguments\": {\"town\": \"Q\"}}]</TOOLCALL>",
     "R R|N look|A {\"town\": \"Q\"}|E1"},
    {"apriel", "Here are my reasoning steps:\n",
     "R Q\n[BEGIN FINAL RESPONSE]\nC\n<tool_calls>[{\"name\": \"look\", \"arguments\": {\"n\": 1}, "
     "\"id\": \"i\"}]</tool_calls>\n<|end|>",
     "R R Q|C C|N look|A {\"n\": 1}|I i|E1"},
    {"apriel1", "", "R\n[BEGIN FINAL RESPONSE]\nC Q\n[END FINAL RESPONSE]", "R R|C C Q"},
    {"llama3", "", "{\"name\": \"look\", \"parameters\": {\"town\": \"Q\"}}<|eot_id|>",
     "N look|A {\"town\": \"Q\"}|E1"},
    {"llama3", "",
     "{\"name\": \"look\", \"parameters\": {}}; {\"type\": \"function\", \"name\": \"add\", "
     "\"parameters\": {\"a\": 1}}",
     "N look|A {}|E1|N add|A {\"a\": 1}|E1"},
    {"llama3", "", "{\"name\": \"Bob\", \"parameters\": {\"Q\": 1}}",
     "C {\"name\": \"Bob\", \"parameters\": {\"Q\": 1}}"},
    {"llama3", "", "{\"Q\": 1} and {\"name\": \"look\"}", "C {\"Q\": 1} and {\"name\": \"look\"}"},
    {"llama3", "", "<|python_tag|>look.call(town=\"Q\", n=\"3\")<|eom_id|>",
     "N look|A {\"town\": \"Q\", \"n\": \"3\"}|E1"},
    {"llama3", "", "<|python_tag|>print(Q", "N print|A {\"Q\"|E0"},
    // Python, Gemma
    {"lfm2", "",
     "<think>R</think>C<|tool_call_start|>[look(town='So\"Q\n'" E_ACUTE "', n=3, o={\"x\": [1, "
     "'y', "
     "None], 'z': {}}, flag=True), add(), add(a = -1.5e3,)]<|tool_call_end|><|im_end|>",
     "R R|C C|N look|A {\"town\": \"So\\\"Q\\n'" E_ACUTE
     "\", \"n\": 3, \"o\": {\"x\": [1, \"y\", null], \"z\": {}}, \"flag\": true}|E1|N add|A "
     "{}|E1|N "
     "add|A {\"a\": -1.5e3}|E1"},
    {"lfm2", "", "<|tool_call_start|>[look(town=\"a\\'b\\\\n\\x41\\u00e9\\q Q\""
     ")]<|tool_call_end|>x",
     "N look|A {\"town\": \"a'b\\\\nA\\u00e9\\\\q Q\"}|E1|C x"},
    {"lfm2", "", "<|tool_call_start|>[{\"name\": \"look\", \"arguments\": {\"n\": "
     "1}}]<|tool_call_end|>",
     "N look|A {\"n\": 1}|E1"},
    {"lfm2", "", "<|tool_call_start|>[look(Q)]<|tool_call_end|>x", "N look|A {\"Q\")]|E0|C x"},
    {"lfm2", "", "<|tool_call_start|>Q is<|tool_call_end|>x",
     "C <|tool_call_start|>Q is<|tool_call_end|>x"},
    {"gemma", "",
     "<|channel>thought\nR Q\n<channel|><|tool_call>call:look{flag:true,n:3,o:{x:[1,<|\"|>y<|\"|>,"
     "None],z:{}},town:<|\"|>So\"Q\n<'<|\"|>}<tool_call|><|tool_call>call:add{}<tool_c"
     "all|>C<turn|>",
     "R R Q|N look|A {\"flag\": true, \"n\": 3, \"o\": {\"x\": [1, \"y\", null], \"z\": {}}, "
     "\"town\": \"So\\\"Q\\n<'\"}|E1|N add|A {}|E1|C C"},
    {"gemma", "", "<|tool_call>call:add{{\"a\": \"Q\"}}<tool_call|>x",
     "N add|A {\"a\": \"Q\"}|E1|C x"},
    {"gemma", "<|channel>thought\n<channel|>", "C Q<|channel>thought\n<channel|>", "C C Q"},
    {"gemma", "", "<|tool_call>call:look{<|\"|>a b<|\"|>:Q w,k:<|\"|>}<tool_call|>",
     "N look|A {\"a b\": \"Q w\", \"k\": \"}<tool_call|>|E0"},
    // headers
    {"harmony", "<|start|>assistant",
     "<|channel|>analysis<|message|>R Q<|end|><|start|>assistant<|channel|>commentary<|message|>P"
     "<|end|><|start|>assistant<|channel|>commentary to=functions.look <|constrain|>json<|message|>"
     "{\"town\": \"Q\"}<|call|>",
     "R R Q|C P|N look|A {\"town\": \"Q\"}|E1"},
    {"harmony", "<|start|>assistant",
     "<|channel|>analysis<|message|>R<|end|><|start|>assistant to=functions.add<|chan"
     "nel|>commentary "
     "json<|message|>{}<|call|>",
     "R R|N add|A {}|E1"},
    {"harmony", "<|start|>assistant", "<|channel|>final<|message|>C Q<|return|>", "C C Q"},
    {"harmony", "<|start|>assistant",
     "<|channel|>commentary to=python code<|message|>print(1) Q<|call|>x", "N python|A "
     "print(1) Q|E0|C x"},
    {"harmony", "<|start|>assistant", "plain Q", "C plain Q"},
    {"harmony", "<|start|>assistant", "<|channel|>Q said<|message|>x", "C <|channel|>Q saidx"},
    {"harmony", "<|start|>assistant", "<|channel|>final", "C <|channel|>final"},
    {"atem", "<|start|>assistant",
     " to=self<|message|>R<|eom|><|start|>assistant to=look<|message|><atem:function_calls>\n"
     "<atem:invoke name=\"look\">\n<atem:parameter name=\"town\">Q</atem:parameter>\n"
     "<atem:parameter name=\"n\">3</atem:parameter>\n</atem:invoke>\n</atem:function_calls><|eot|>",
     "R R|N look|A {\"town\": \"Q\", \"n\": 3}|E1"},
    {"atem", "<|start|>assistant", " to=user<|message|>C Q<|eot|>", "C C Q"},
};
enum { N_ANSWERS = sizeof answers / sizeof answers[0] };

typedef struct bytes {
    char *text;
    size_t size, capacity;
} bytes;

// ---- transcripts -----------------------------------------------------------------------------

typedef struct transcript {
    char *text;
    size_t size, capacity;
    char kind;
    int32_t call;
    int all_good;     // the order of pieces is, and what is called valid is JSON
    char *args;       // of the call
    size_t args_size, args_capacity;
    int stop_at, n;   // the callback returns 0 at every piece that stop_at divides; 0: never
    int in_call, has_end;
} transcript;

static void append(char **text, size_t *size, size_t *capacity, const char *more, size_t n) {
    if (*size + n + 1 > *capacity) {
        *capacity = 2 * (*size + n) + 256;
        *text = (char *)realloc(*text, *capacity);
    }
    if (n) memcpy(*text + *size, more, n);
    (*text)[*size += n] = 0;
}

static int is_object(const char *text, size_t size) {
    moe_allocator allocator;
    moe__store store;
    moe__value value;
    moe__allocator_init(&allocator, NULL, NULL);
    moe__store_init(&store, &allocator, 1 << 30, UINT64_MAX, 1000);
    const moe_status status = moe__json_read(&store, text, size, &value, NULL);
    const int good = status == MOE_OK && value.kind == MOE__VALUE_DICT;
    moe__store_free(&store);
    return good;
}

static int on_piece(void *user, const moe_chat_piece *piece) {
    transcript *t = (transcript *)user;
    const char kind = "CRNAIE"[piece->kind];
    const int is_text = kind == 'C' || kind == 'R';
    if (kind == 'A')
        append(&t->args, &t->args_size, &t->args_capacity, piece->text, piece->size);
    if (kind == 'N') {
        t->all_good &= !t->in_call && piece->call == t->call && piece->size > 0;
        t->in_call = 1;
        t->args_size = 0;
    }
    if (!is_text) t->all_good &= t->in_call && piece->call == t->call;
    if (kind != 'E') t->all_good &= piece->size > 0 && !piece->is_valid;
    if (kind == 'E') {
        if (piece->is_valid) t->all_good &= is_object(t->args, t->args_size);
        t->in_call = 0;
        t->call++;
    }
    if (kind != t->kind || !strchr("CRA", kind)) {
        const char head[3] = {'|', kind, kind == 'E' ? (char)('0' + piece->is_valid) : ' '};
        append(&t->text, &t->size, &t->capacity, head + !t->size, sizeof head - !t->size);
    }
    append(&t->text, &t->size, &t->capacity, piece->text, piece->size);
    t->kind = kind;
    t->n++;
    return !t->stop_at || t->n % t->stop_at;
}
static void forget(transcript *t) {
    const int stop_at = t->stop_at;
    free(t->text);
    free(t->args);
    memset(t, 0, sizeof *t);
    t->all_good = 1;
    t->stop_at = stop_at;
    append(&t->text, &t->size, &t->capacity, "", 0);
}

static int is_same(const transcript *a, const transcript *b) {
    return a->size == b->size && !memcmp(a->text, b->text, a->size);
}

static const moe__answer_form *form_called(const char *name) {
    for (int i = 0; i < MOE__ANSWER_FORMS; i++)
        if (!strcmp(moe__answer_forms[i].name, name)) return &moe__answer_forms[i];
    CHECKF(0, "no form %s", name);
    return &moe__answer_forms[MOE__ANSWER_FORMS - 1];
}

static moe_chat_parser *open_parser(const answer *a, const char *request, meter *m, transcript *t) {
    moe_allocator wanted = meter_allocator(m), allocator;
    moe__allocator_init(&allocator, &wanted, NULL);
    return moe__answer_parser(&allocator, NULL, form_called(a->form), request, strlen(request),
                              a->prompt, strlen(a->prompt), on_piece, t, NULL);
}

static moe_status push(moe_chat_parser *p, const char *text, size_t size) {
    moe_status status = moe_chat_parser_push(p, text, size);
    while (status == MOE_ERROR_CANCELLED) status = moe_chat_parser_push(p, NULL, 0);
    return status;
}
static moe_status finish(moe_chat_parser *p) {
    moe_status status = moe_chat_parser_finish(p);
    while (status == MOE_ERROR_CANCELLED) status = moe_chat_parser_finish(p);
    return status;
}

// Pieces of n bytes; 0: of any.
static void run(moe_chat_parser *p, transcript *t, const char *text, size_t size, size_t n,
                uint64_t *seed) {
    forget(t);
    for (size_t i = 0; i < size;) {
        size_t now = n ? n : 1 + moe__splitmix64(seed) % 24;
        if (now > size - i) now = size - i;
        char *copy = (char *)malloc(now); // so that a sanitizer sees what is read behind it
        memcpy(copy, text + i, now);
        CHECK(push(p, copy, now) == MOE_OK);
        free(copy);
        i += now;
    }
    CHECK(finish(p) == MOE_OK);
}

static size_t count(const char *text, size_t size, char c) {
    size_t n = 0;
    for (size_t i = 0; i < size; i++) n += text[i] == c;
    return n;
}

// ---- tests -----------------------------------------------------------------------------------

TEST(answers_come_apart_however_they_are_cut) {
    uint64_t seed = 1;
    for (int i = 0; i < N_ANSWERS; i++) {
        const answer *a = &answers[i];
        const size_t size = strlen(a->text);
        meter m;
        transcript t;
        memset(&m, 0, sizeof m);
        memset(&t, 0, sizeof t);
        moe_chat_parser *p = open_parser(a, TOOLS, &m, &t);
        CHECK(p != NULL);
        if (!p) continue;
        run(p, &t, a->text, size, size + 1, &seed);
        CHECKF(!strcmp(t.text, a->transcript), "%d %s: %s\n    gives  %s\n    not    "
         "%s", i, a->form,
               a->text, t.text, a->transcript);
        CHECKF(t.all_good, "%d %s: %s", i, a->form, a->text);
        if (strcmp(t.text, a->transcript)) continue;
        for (size_t cut = 1; cut <= size; cut++) {
            forget(&t);
            CHECK(push(p, a->text, cut) == MOE_OK && push(p, a->text + cut, size - cut) == MOE_OK);
            CHECK(finish(p) == MOE_OK);
            CHECKF(!strcmp(t.text, a->transcript) && t.all_good, "%d %s at %d: %s", i, a->form,
                   (int)cut, t.text);
        }
        for (int k = 0; k < 8; k++) { // byte by byte and at random, stopping sometimes
            t.stop_at = k % 4;
            run(p, &t, a->text, size, k < 4, &seed);
            CHECKF(!strcmp(t.text, a->transcript) && t.all_good, "%d %s byte by byte: %s", i,
                   a->form, t.text);
        }
        moe_chat_parser_close(p);
        forget(&t);
        free(t.text);
        CHECK(m.live == 0);
    }
}

TEST(answers_that_end_early_lose_nothing) {
    uint64_t seed = 2;
    for (int i = 0; i < N_ANSWERS; i++) {
        const answer *a = &answers[i];
        meter m;
        transcript t, other;
        memset(&m, 0, sizeof m);
        memset(&t, 0, sizeof t);
        memset(&other, 0, sizeof other);
        moe_chat_parser *p = open_parser(a, TOOLS, &m, &t);
        if (!p) continue;
        for (size_t size = 0; size < strlen(a->text); size++) {
            run(p, &t, a->text, size, size + 1, &seed);
            CHECKF(t.all_good && !t.in_call, "%d %s, %d bytes: %s", i, a->form, (int)size, t.text);
            CHECKF(count(t.text, t.size, 'Q') == count(a->text, size, 'Q'),
                   "%d %s, %d bytes: %s", i, a->form, (int)size, t.text);
            p->user = &other;
            run(p, &other, a->text, size, 1, &seed);
            p->user = &t;
            CHECKF(!strcmp(t.text, other.text), "%d %s, %d bytes: %s, byte by byte %s", i, a->form,
                   (int)size, t.text, other.text);
        }
        moe_chat_parser_close(p);
        free(t.text);
        free(t.args);
        free(other.text);
        free(other.args);
    }
}

// ---- broken answers --------------------------------------------------------------------------

// Some of what answers are made of, so that changes hit the states of the machine.
static const char *const scraps[] = {
    "{",       "}",        "[",         "]",    "\"",      "'",          ",",        ":",     "\n",
    "\\",      "\\u",      "\\ud83d\\ude00", "<",  ">",       "name",       "arguments", "l"
    "ook", "add",
    "\"name\": \"look\"", "\"arguments\": {\"a\": 1}", "```json", "```", "n"
    "ull", "1e", "-", "(", ")", "=",
    "<think>", "</think>", "\303\251", "\343\202", "\377", "\001", "  ", "to=", "all\n", "<|\""
    "|>", "]]>",
    "<![CDATA[", "{\"a\": \"b\"}", "functions.look:0", "call:", "<|message|>", "<|end|>",
    "Q", "J", "W", "Z", "QJ\303\251", "\"Q\": \"J\", ", "\"type\": \"W\", ", "to=Q "};
enum { N_SCRAPS = sizeof scraps / sizeof scraps[0] };

static size_t mutate(char *text, size_t size, size_t capacity, const moe_chat_parser *p,
                     uint64_t *seed) {
    for (uint64_t n = 1 + moe__splitmix64(seed) % 4; n; n--) {
        const size_t at = (size_t)(moe__splitmix64(seed) % (size + 1));
        size_t cut = (size_t)(moe__splitmix64(seed) % 16), more;
        const uint64_t what = moe__splitmix64(seed) % 6, which = moe__splitmix64(seed);
        char copy[64];
        if (what < 3) cut = 0; // insert
        if (cut > size - at) cut = size - at;
        memmove(text + at, text + at + cut, size - at - cut);
        size -= cut;
        if (what == 3) continue; // leave out
        const char *scrap = scraps[which % N_SCRAPS];
        more = strlen(scrap);
        const char byte = (char)(which / 64);
        if (which % 32 == 0) { // any byte
            more = 1;
            scrap = &byte;
        } else if (what % 2 && p->n_marks) {
            const moe__answer_mark *mark = &p->marks[which % (uint64_t)p->n_marks];
            scrap = mark->text;
            more = mark->size - which / 64 % 8 * (which / 512 % 4 == 0 && mark->size > 8);
        } else if (what == 2 && size > 40 && which & 64) { // a part of itself
            more = 20;
            scrap = text + which / 128 % (size - 20);
        } else if (what == 2) { // or of another answer
            const char *other = answers[which % N_ANSWERS].text;
            const size_t n = strlen(other);
            more = n < 30 ? n : 30;
            scrap = other + which / 128 % (n - more + 1);
        }
        if (more > sizeof copy || size + more > capacity) continue;
        memcpy(copy, scrap, more);
        memmove(text + at + more, text + at, size - at);
        memcpy(text + at, copy, more);
        size += more;
    }
    return size;
}

static long n_fuzz = 5000; // answers, each changed four times
static uint64_t fuzz_seed = 3;

TEST(broken_answers_come_apart_however_they_are_cut) {
    static const char letters[] = "QJWZ"; // in no mark, and in nothing else that is dropped
    static const char *const requests[] = {
        TOOLS, "{\"messages\": []}",
        "{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\"}], \"my_tools\": [1], "
        "\"continue_final_message\": true}"};
    uint64_t seed = fuzz_seed;
    transcript t, other;
    memset(&t, 0, sizeof t);
    memset(&other, 0, sizeof other);
    for (long i = 0; i < n_fuzz && test_failures < 5; i++) {
        const answer *a = &answers[moe__splitmix64(&seed) % N_ANSWERS];
        meter m;
        char text[2048];
        size_t size = strlen(a->text);
        memset(&m, 0, sizeof m);
        moe_chat_parser *p = open_parser(a, requests[i % 16 < 3 ? i % 16 : 0], &m, &t);
        CHECK(p != NULL && size < sizeof text);
        if (!p) break;
        memcpy(text, a->text, size);
        for (int k = 0; k < 4; k++) {
            size = mutate(text, size, sizeof text - 1, p, &seed);
            p->user = &t;
            run(p, &t, text, size, size + 1, &seed);
            p->user = &other;
            other.stop_at = (int)(moe__splitmix64(&seed) % 4);
            run(p, &other, text, size, (size_t)(k & 1), &seed);
            CHECKF(t.all_good && other.all_good && !t.in_call, "%ld %s: %.*s gives %s", i, a->form,
                   (int)size, text, t.text);
            text[size] = 0;
            // Escapes may say a letter, and in Kimi's way the id holds the name again.
            const int may_grow = memchr(text, '\\', size) || !strcmp(a->form, "kimi2");
            for (const char *c = letters; *c; c++) {
                const size_t n = count(text, size, *c), n_out = count(t.text, t.size, *c);
                CHECKF(n_out == n || (n_out > n && may_grow), "%ld %s: %s\n  of %c has %d in %s",
                       i, a->form, text, *c, (int)n_out, t.text);
            }
            CHECKF(is_same(&t, &other), "%ld %s: %.*s\n  gives %s\n  and   %s", i, a->form,
                   (int)size, text, t.text, other.text);
        }
        moe_chat_parser_close(p);
        CHECK(m.live == 0);
    }
    free(t.text);
    free(t.args);
    free(other.text);
    free(other.args);
}

// ---- what templates write --------------------------------------------------------------------

static void put(bytes *b, const void *data, size_t n) {
    append(&b->text, &b->size, &b->capacity, (const char *)data, n);
}
static void put_number(bytes *b, uint64_t x, size_t n) { put(b, &x, n); }
static void put_text(bytes *b, const char *text) {
    put_number(b, strlen(text), 8);
    put(b, text, strlen(text));
}

// A vocabulary of a few control tokens, as a file in memory. chat_template may be NULL.
static moe_vocab *open_vocab(const char *chat_template, const moe_allocator *allocator) {
    static const char *const tokens[] = {"<BOS>", "<EOS>", "<|im_start|>", "<|im_end|>", "a"};
    bytes b;
    moe_error error;
    moe_gguf_options options;
    memset(&b, 0, sizeof b);
    memset(&error, 0, sizeof error);
    memset(&options, 0, sizeof options);
    if (allocator) options.allocator = *allocator;
    put(&b, "GGUF", 4);
    put_number(&b, 3, 4);
    put_number(&b, 0, 8);
    put_number(&b, chat_template ? 7 : 6, 8);
    put_text(&b, "tokenizer.ggml.model");
    put_number(&b, MOE_VALUE_STRING, 4);
    put_text(&b, "gpt2");
    put_text(&b, "tokenizer.ggml.tokens");
    put_number(&b, MOE_VALUE_ARRAY, 4);
    put_number(&b, MOE_VALUE_STRING, 4);
    put_number(&b, 5, 8);
    for (int i = 0; i < 5; i++) put_text(&b, tokens[i]);
    put_text(&b, "tokenizer.ggml.token_type");
    put_number(&b, MOE_VALUE_ARRAY, 4);
    put_number(&b, MOE_VALUE_INT32, 4);
    put_number(&b, 5, 8);
    for (int i = 0; i < 5; i++) put_number(&b, i < 4 ? 3 : 1, 4);
    put_text(&b, "tokenizer.ggml.merges");
    put_number(&b, MOE_VALUE_ARRAY, 4);
    put_number(&b, MOE_VALUE_STRING, 4);
    put_number(&b, 0, 8);
    put_text(&b, "tokenizer.ggml.bos_token_id");
    put_number(&b, MOE_VALUE_UINT32, 4);
    put_number(&b, 0, 4);
    put_text(&b, "tokenizer.ggml.eos_token_id");
    put_number(&b, MOE_VALUE_UINT32, 4);
    put_number(&b, 1, 4);
    if (chat_template) {
        put_text(&b, "tokenizer.chat_template");
        put_number(&b, MOE_VALUE_STRING, 4);
        put_text(&b, chat_template);
    }
    moe_gguf *gguf = moe_gguf_open_memory(b.text, b.size, &options, &error);
    moe_vocab *vocab = gguf ? moe_vocab_open(gguf, &error) : NULL;
    CHECKF(vocab, "%s: %s", error.where, error.text);
    moe_gguf_close(gguf);
    free(b.text);
    return vocab;
}

// Messages of an assistant and what must come out of the text that a template makes of them.
typedef struct scene {
    char letter;
    const char *message; // its members behind "role"
    const char *reasoning, *content;
    const char *calls; // [[name, arguments], ...]
} scene;

#define NESTED \
    "{\"town\": \"So\\\"f'i\\\\a\\n\\tE " E_ACUTE " \360\237\230\200 <b> </think> {x: [1]} " \
    "</tool_call>, end\", \"n\": -3, \"flag\": true, \"o\": {\"x\": [1, 2.5, -1e-7], \"z\": " \
    "{\"deep\": {\"q\": \"it's \\\"so\\\"\", \"none\": null, \"no\": false}}}, \"any\": \"12\"}"
#define CALL(id, name, arguments)                                                       \
    "{\"id\": \"" id "\", \"type\": \"function\", \"function\": {\"name\": \"" name "\", " \
    "\"arguments\": " arguments "}}"
// as templates name it
#define REASONING(text) \
    "\"reasoning_content\": \"" text "\", \"reasoning\": \"" text "\", \"thinking\": \"" text "\""
#define NESTED_TEXT \
    "\"{\\\"town\\\": \\\"So\\\\n Q\\\\\\\"\\\", \\\"o\\\": {\\\"x\\\": [1]}, \\\"flag\\\": " \
    "false}\""

static const scene scenes[] = {
    {'c', "\"content\": \"Plain text.\\n\\n* \\\"One\\\" < 2 & {3}\"", "",
     "Plain text.\n\n* \"One\" < 2 & {3}", "[]"},
    {'r', "\"content\": \"The text.\", " REASONING("First {a}.\\n\\nThen b."),
     "First {a}.\n\nThen b.", "The text.", "[]"},
    {'s', "\"content\": \"\", \"tool_calls\": [" CALL("abc123xyz", "look", "{\"town\": \""
     "Sofia\"}") "]",
     "", "", "[[\"look\", {\"town\": \"Sofia\"}]]"},
    {'t', "\"content\": \"\", \"tool_calls\": [" CALL("abc123xyz", "look", "{\"town\": \""
     "Sofia\"}") ", "
     CALL("def456uvw", "add", "{\"a\": 1.5}") "]", "", "",
     "[[\"look\", {\"town\": \"Sofia\"}], [\"add\", {\"a\": 1.5}]]"},
    {'n', "\"content\": \"\", \"tool_calls\": [" CALL("abc123xyz", "look", NESTED) "]",
     "", "", "[[\"look\", " NESTED "]]"},
    {'j', "\"content\": \"\", \"tool_calls\": [" CALL("abc123xyz", "look", NESTED_TEXT) "]",
     "", "", "[[\"look\", {\"town\": \"So\\n Q\\\"\", \"o\": {\"x\": [1]}, \"flag\": false}]]"},
    {'e', "\"content\": \"\", \"tool_calls\": [" CALL("abc123xyz", "look", "{}") "]", "", "",
     "[[\"look\", {}]]"},
    {'b', "\"content\": \"I see to it.\", \"tool_calls\": [" CALL("abc123xyz", "look",
     "{\"n\": 7}") "]", "", "I see to it.", "[[\"look\", {\"n\": 7}]]"},
    {'a', "\"content\": \"I see to it.\", " REASONING("First {a}: where?") ", "
     "\"tool_calls\": [" CALL("abc123xyz", "look", "{\"n\": 7, \"o\": {\"x\": []}}") "]",
     "First {a}: where?", "I see to it.", "[[\"look\", {\"n\": 7, \"o\": {\"x\": []}}]]"},
};
enum { N_SCENES = sizeof scenes / sizeof scenes[0] };

// What came out of an answer, put together.
typedef struct taken {
    bytes texts[2]; // content, reasoning
    bytes calls;    // as in scenes
    int n_calls, all_valid;
} taken;

static int take_piece(void *user, const moe_chat_piece *piece) {
    taken *t = (taken *)user;
    if (piece->kind <= MOE_CHAT_REASONING) put(&t->texts[piece->kind], piece->text, piece->size);
    if (piece->kind == MOE_CHAT_TOOL_NAME) {
        put(&t->calls, ", [\"" + (t->n_calls ? 0 : 2), t->n_calls ? 4 : 2);
        t->n_calls++;
        put(&t->calls, piece->text, piece->size);
        put(&t->calls, "\", ", 3);
    }
    if (piece->kind == MOE_CHAT_TOOL_ARGUMENTS) put(&t->calls, piece->text, piece->size);
    if (piece->kind == MOE_CHAT_TOOL_END) {
        t->all_valid &= piece->is_valid;
        put(&t->calls, "]", 1);
    }
    return 1;
}
static void take_begin(taken *t) {
    memset(t, 0, sizeof *t);
    t->all_valid = 1;
    put(&t->texts[0], "", 0);
    put(&t->texts[1], "", 0);
    put(&t->calls, "[", 1);
}
static void take_end(taken *t) {
    free(t->texts[0].text);
    free(t->texts[1].text);
    free(t->calls.text);
}

// The same JSON: kinds and order in lists count, order of members does not.
static int is_same_value(moe__store *store, moe__value a, moe__value b) {
    if (a.kind == MOE__VALUE_LIST && b.kind == MOE__VALUE_LIST) {
        int same = a.as.list->n == b.as.list->n;
        for (uint64_t i = 0; same && i < a.as.list->n; i++)
            same = is_same_value(store, a.as.list->items[i], b.as.list->items[i]);
        return same;
    }
    if (a.kind == MOE__VALUE_DICT && b.kind == MOE__VALUE_DICT) {
        int same = a.as.dict->n == b.as.dict->n;
        for (uint64_t i = 0; same && i < a.as.dict->n; i++) {
            const moe__pair *entry = &a.as.dict->entries[i];
            const moe__value *other = moe__dict_find(store, b.as.dict, entry->key);
            same = other && is_same_value(store, entry->value, *other);
        }
        return same;
    }
    return a.kind == b.kind && moe__value_equal(store, a, b);
}
static int is_same_json(const char *a, const char *b) {
    moe_allocator allocator;
    moe__store store;
    moe__value x, y;
    moe__allocator_init(&allocator, NULL, NULL);
    moe__store_init(&store, &allocator, 1 << 30, UINT64_MAX, 1000);
    const int same = moe__json_read(&store, a, strlen(a), &x, NULL) == MOE_OK &&
                     moe__json_read(&store, b, strlen(b), &y, NULL) == MOE_OK &&
                     is_same_value(&store, x, y);
    moe__store_free(&store);
    return same;
}

static char *read_text(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    bytes b;
    char part[4096];
    memset(&b, 0, sizeof b);
    for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) put(&b, part, n);
    fclose(file);
    return b.text;
}

static char *format(const moe_vocab *vocab, const char *request) {
    const int64_t n = moe_chat_format(vocab, request, strlen(request), NULL, 0, NULL);
    if (n < 0) return NULL;
    char *text = (char *)malloc((size_t)n + 1);
    CHECK(moe_chat_format(vocab, request, strlen(request), text, (size_t)n, NULL) == n);
    text[n] = 0;
    return text;
}

#define PROPERTY(name, type, more) \
    "\"" name "\": {\"type\": \"" type "\", \"description\": \"The " name ".\"" more "}"
#define FUNCTION(name, properties)                                                           \
    "{\"type\": \"function\", \"function\": {\"name\": \"" name "\", \"description\": \"Does " \
    "it.\", \"parameters\": {\"type\": \"object\", \"properties\": {" properties                \
    "}, \"required\": []}}}"
#define TRIP_TOOLS                                                                                \
    "tools\": [" FUNCTION("look", PROPERTY("town", "string", "") ", " PROPERTY("n", "integer", "") \
    ", " PROPERTY("flag", "boolean", "") ", " PROPERTY("o", "object", ", \"properties\": {"        \
    PROPERTY("x", "array", ", \"items\": {\"type\": \"number\"}") ", "                             \
    PROPERTY("z", "object", "") "}, \"additionalProperties\": {\"type\": \"string\"}")             \
    ", " PROPERTY("any", "string", "")) ", " FUNCTION("add", PROPERTY("a", "number", "")) "]}"

static int is_verbose;

// Where the answer begins in `whole`: behind the prompt or, where the prompt opens reasoning that
// the message has none of, in front of its mark; where the prompt has another turn in front of the
// answer, behind what it ends with.
static char *answer_in(char *whole, const char *prompt, const moe_chat_parser *p) {
    const char *think = p->form->think, *mark = NULL;
    size_t n = 0;
    while (prompt[n] && prompt[n] == whole[n]) n++;
    for (const char *at = prompt; think && prompt[n] && (at = strstr(at, think)); at++)
        if (at <= prompt + n) mark = at;
    if (mark && mark + strlen(think) > prompt + n) return whole + (mark - prompt);
    const char *tail = prompt + strlen(prompt) - (strlen(prompt) > 17 ? 17 : 0);
    char *from = prompt[n] ? strstr(whole + (n > 17 ? n - 17 : 0), tail) : NULL;
    return from ? from + strlen(tail) : whole + n;
}
// Some templates write on behind the token that ends an answer.
static void end_answer(char *answer) {
    static const char *const ends[] = {"<|END_OF_TURN_TOKEN|>", "<SPECIAL_12>", "<|eot_id|>",
                                       "<" BAR "end" LOW "of" LOW "sentence" BAR ">", "]```\n"};
    for (int i = 0; i < 5; i++) {
        char *end = strstr(answer, ends[i]);
        if (end) end[strlen(ends[i])] = 0;
    }
}

static char *trip_request(const scene *s, const char *tools, int thinks) {
    static const char form[] =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}%s%s%s], \"now\": "
        "\"2026-03-14T15:09:26\", \"enable_thinking\": %s, \"reasoning_effort\": \"high\", \""
        "functions\": \"[]\", \"datetime\": \"now\", \"adapt_messages\": true, "
        "\"add_generation_prompt\": %s, %s";
    const size_t size = 4096;
    char *request = (char *)malloc(size);
    snprintf(request, size, form, s ? ", {\"role\": \"assistant\", " : "", s ? s->message : "",
             s ? "}" : "", thinks ? "true" : "false", s ? "false" : "true", tools);
    return request;
}

// The parser has got an answer that a template made of a scene.
static char judge(const scene *s, const char *answer, const taken *t) {
    const int no_reasoning = *s->reasoning && !strstr(answer, "First {a}");
    const int no_content = *s->content && !strstr(answer, "text.") && !strstr(answer, "see to");
    const int has_first = strstr(answer, "look") != NULL;
    const int is_cut = s->letter == 't' && has_first && !strstr(answer, "add");
    const char *calls = is_cut ? scenes[2].calls : has_first ? s->calls : "[]";
    const int good = !strcmp(t->texts[0].text, no_content ? "" : s->content) &&
                     !strcmp(t->texts[1].text, no_reasoning ? "" : s->reasoning) &&
                     is_same_json(t->calls.text, calls) && t->all_valid;
    return !good ? '!' : no_reasoning || no_content || strcmp(calls, s->calls) ? 'd' : '+';
}

// What comes out does not depend on the cuts.
static void check_cuts(moe_chat_parser *p, const char *answer, const char *name) {
    const size_t size = strlen(answer);
    uint64_t seed = 6;
    transcript t, other;
    memset(&t, 0, sizeof t);
    memset(&other, 0, sizeof other);
    p->on_piece = on_piece;
    p->user = &t;
    run(p, &t, answer, size, size, &seed);
    p->user = &other;
    for (int k = 0; k < 3; k++) {
        other.stop_at = k;
        run(p, &other, answer, size, k == 0, &seed);
        CHECKF(is_same(&t, &other) && t.all_good && other.all_good, "%s: %s\n  gives %s\n  and "
         "  %s",
               name, answer, t.text, other.text);
    }
    forget(&t);
    forget(&other);
    free(t.text);
    free(other.text);
}

// What comes of a scene: '+' it comes back, 'd' the template drops something and the rest comes
// back, 'x' the template raises an error, '!' it is lost.
static char round_trip(const char *name, const moe_vocab *vocab, const scene *s,
                       const char *tools, int thinks) {
    char *before = trip_request(NULL, tools, thinks), *after = trip_request(s, tools, thinks);
    char result = 'x';
    char *prompt = format(vocab, before), *whole = format(vocab, after);
    taken t;
    take_begin(&t);
    if (prompt && whole) {
        moe_chat_parser *p =
            moe_chat_parser_open(vocab, before, strlen(before), take_piece, &t, NULL);
        CHECK(p != NULL);
        char *answer = answer_in(whole, prompt, p);
        end_answer(answer);
        const char *unthink = p->is_thinking ? p->form->unthink : NULL;
        const char *first = answer + strspn(answer, " \n");
        if (unthink && !strstr(answer, "First {a}") && strncmp(first, unthink, strlen(unthink)))
            CHECK(push(p, unthink, strlen(unthink)) == MOE_OK); // a model closes what is open
        CHECK(push(p, answer, strlen(answer)) == MOE_OK && finish(p) == MOE_OK);
        put(&t.calls, "]", 1);
        result = judge(s, answer, &t);
        check_cuts(p, answer, name);
        moe_chat_parser_close(p);
        if (is_verbose && result != '+')
            printf("%s %c%c: %s---%s\n  C %s\n  R %s\n  calls %s\n", name, s->letter, result,
                   prompt + strlen(prompt) - (strlen(prompt) > 40 ? 40 : 0), answer,
                   t.texts[0].text, t.texts[1].text, t.calls.text);
    }
    take_end(&t);
    free(prompt);
    free(whole);
    free(before);
    free(after);
    return result;
}

// Where not all comes back: what comes of each scene, and what the template does.
static const struct {
    const char *name, *scenes, *why;
} losses[] = {
    {"Apertus-8B-Instruct", "+d++++++d", "no reasoning"},
    {"Cohere2MoE", "+++++++dd", "no content beside calls"},
    {"CohereForAI-c4ai-command-r-plus-tool_use", "+d++++++d", "no reasoning"},
    {"CohereForAI-c4ai-command-r7b-12-2024-tool_use", "+d+++++dd",
     "no reasoning, no content beside calls"},
    {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "+dddddddd", "no reasoning, no calls"},
    {"deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "+d+++++dd",
     "no reasoning, no content beside calls"},
    {"deepseek-ai-DeepSeek-V3.1", "+d++++++d", "no reasoning"},
    {"fireworks-ai-llama-3-firefunction-v2", "+d++++++d", "no reasoning"},
    {"GigaChat3-10B-A1.8B", "+d+d++++d", "no reasoning, one call"},
    {"GigaChat3.1-10B-A1.8B", "+d+d++++d", "no reasoning, one call"},
    {"google-gemma-2-2b-it", "+dddddddd", "no reasoning, no calls"},
    {"google-gemma-4-31B-it", "+d+++++++", "reasoning beside calls only"},
    {"google-gemma-4-31B-it-interleaved", "+d+++++++", "reasoning beside calls only"},
    {"HuggingFaceTB-SmolLM3-3B", "+dddddddd", "no reasoning, no calls"},
    {"ibm-granite-granite-3.3-2B-Instruct", "+dddddddd", "no reasoning, no calls"},
    {"ibm-granite-granite-4.0", "+d++++++d", "no reasoning"},
    {"ibm-granite-granite-4.1", "+d++++++d", "no reasoning"},
    {"Kimi-K2-Instruct", "+dxxxxxxx", "no reasoning; calls raise, as lists have no append"},
    {"Kimi-K2-Thinking", "+dxxxxxxx", "no reasoning; calls raise, as lists have no append"},
    {"LFM2-8B-A1B", "+dddddddd", "no reasoning, no calls"},
    {"LFM2.5-8B-A1B", "++++!++++", "strings without escapes"},
    {"LFM2.5-Instruct", "+dddddddd", "no reasoning, no calls"},
    {"llama-cpp-deepseek-r1", "+d+++++dd", "no reasoning, no content beside calls"},
    {"llama-cpp-rwkv-world", "+dddddddd", "no reasoning, no calls"},
    {"meetkai-functionary-medium-v3.1", "+d++++++d", "no reasoning"},
    {"meetkai-functionary-medium-v3.2", "+dxxx+xxx",
     "no reasoning; arguments that are objects raise"},
    {"meta-llama-Llama-3.1-8B-Instruct", "+d+x+++dd",
     "no reasoning, no content beside calls; two calls raise"},
    {"meta-llama-Llama-3.2-3B-Instruct", "+d+x+++dd",
     "no reasoning, no content beside calls; two calls raise"},
    {"meta-llama-Llama-3.3-70B-Instruct", "+d+x+++dd",
     "no reasoning, no content beside calls; two calls raise"},
    {"microsoft-Phi-3.5-mini-instruct", "+dddddddd", "no reasoning, no calls"},
    {"MiMo-VL", "+d++++++d", "no reasoning"},
    {"MiniMax-M1", "+d+++++dd", "no reasoning, no content beside calls"},
    {"MiniMax-M3", "++++!++++", "no members that are null"},
    {"Mistral-Small-3.2-24B-Instruct-2506", "+d+++++dd", "no reasoning, no content beside calls"},
    {"mistralai-Ministral-3-14B-Reasoning-2512", "+d++++++d", "no reasoning"},
    {"mistralai-Mistral-Nemo-Instruct-2407", "+d+++++dd", "no reasoning, no content beside calls"},
    {"moonshotai-Kimi-K2", "+d++++++d", "no reasoning"},
    {"muse-glimmer", "+++++++dd", "no content beside calls"},
    {"NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "+d+++++dd",
     "no reasoning, no content beside calls"},
    {"NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "+d+++++dd",
     "no reasoning, no content beside calls"},
    {"NVIDIA-Nemotron-Nano-v2", "+d+++++dd", "no reasoning, no content beside calls"},
    {"openai-gpt-oss-120b", "+++d+++!x",
     "one call; content beside calls is written as reasoning, with reasoning it raises"},
    {"Qwen-Qwen2.5-7B-Instruct", "+d++++++d", "no reasoning"},
    {"Qwen-QwQ-32B", "+d++++++d", "no reasoning"},
    {"Qwen3-Coder", "+d++++++d", "no reasoning"},
    {"unsloth-Apriel-1.5", "+d++++++d", "no reasoning"},
    {"unsloth-mistral-Devstral-Small-2507", "+d++++++d", "no reasoning"},
    {"upstage-Solar-Open-100B", "+++++++dd", "no content beside calls"},
};

TEST(what_templates_write_comes_back) {
    static const char folder[] = "../shared/golden/chat/";
    DIR *files = opendir(folder);
    if (!files) SKIP("no %s", folder);
    int n[4] = {0, 0, 0, 0}, n_templates = 0;
    for (struct dirent *file; (file = readdir(files));) {
        char path[512], name[256], came[N_SCENES + 1] = "";
        const char *end = strstr(file->d_name, ".jinja"), *known = "+++++++++", *why = "";
        if (!end) continue;
        snprintf(name, sizeof name, "%.*s", (int)(end - file->d_name), file->d_name);
        snprintf(path, sizeof path, "%s%s", folder, file->d_name);
        char *source = read_text(path);
        moe_vocab *vocab = open_vocab(source, NULL);
        for (size_t i = 0; i < sizeof losses / sizeof losses[0]; i++)
            if (!strcmp(losses[i].name, name)) known = losses[i].scenes, why = losses[i].why;
        for (int i = 0; vocab && i < N_SCENES; i++) {
            came[i] = round_trip(name, vocab, &scenes[i], "\"" TRIP_TOOLS, 1);
            // Where they are nothing for the template, they are still known to the parser.
            if (came[i] == 'x')
                came[i] = round_trip(name, vocab, &scenes[i], "\"other_" TRIP_TOOLS, 1);
            n[0]++;
            n[1] += came[i] == '+';
            n[2] += came[i] == 'd';
            n[3] += came[i] == 'x';
            // the same where the prompt closes the reasoning
            if (!*scenes[i].reasoning && came[i] != '!')
                CHECKF(round_trip(name, vocab, &scenes[i], "\"" TRIP_TOOLS, 0) != '!', "%s: %c",
                       name, scenes[i].letter);
        }
        CHECKF(!strcmp(came, known), "%s: %s, not %s (%s)", name, came, known, why);
        n_templates++;
        moe_vocab_close(vocab);
        free(source);
    }
    closedir(files);
    printf("  %d of %d messages of %d templates come back, %d as far as the template writes them; "
           "%d raise an error\n", n[1], n[0], n_templates, n[2], n[3]);
}

// ---- what goes on with a message -------------------------------------------------------------

// A message that is half there: what follows goes on with it, whatever the template.
TEST(an_answer_goes_on_with_its_message) {
    static const char folder[] = "../shared/golden/chat/";
    static const char half[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\""
                               "role\": "
                               "\"assistant\", \"content\": \"Long te\"}], \"functions\": \"[]\", "
                               "\"datetime\": \"now\", \"now\": \"2026-03-14T15:09:26\", "
                               "\"continue_final_message\": true, \"tools\": []}";
    DIR *files = opendir(folder);
    if (!files) SKIP("no %s", folder);
    int n = 0;
    for (struct dirent *file; (file = readdir(files));) {
        char path[512];
        if (!strstr(file->d_name, ".jinja")) continue;
        snprintf(path, sizeof path, "%s%s", folder, file->d_name);
        char *source = read_text(path);
        moe_vocab *vocab = open_vocab(source, NULL);
        taken t;
        take_begin(&t);
        moe_chat_parser *p =
            vocab ? moe_chat_parser_open(vocab, half, strlen(half), take_piece, &t, NULL) : NULL;
        if (p) {
            CHECK(push(p, " xt.\n\nEnd.", 11) == MOE_OK && finish(p) == MOE_OK);
            // this one puts the message behind <think>
            const int is_thinking = strstr(file->d_name, "NVIDIA-Nemotron-Nano-v2") != NULL;
            CHECKF(!strcmp(t.texts[is_thinking].text, " xt.\n\n"
             "End.") && !t.texts[!is_thinking].size,
                   "%s: %s, %s", file->d_name, t.texts[0].text, t.texts[1].text);
            n++;
        }
        moe_chat_parser_close(p);
        take_end(&t);
        moe_vocab_close(vocab);
        free(source);
    }
    closedir(files);
    printf("  %d templates\n", n);
}

static void check_goes_on(const char *source, const char *members, const char *text,
                          const char *content, const char *reasoning) {
    char request[1024];
    taken t;
    moe_error error;
    memset(&error, 0, sizeof error);
    snprintf(request, sizeof request, "{\"messages\": [{\"role\": \"assistant\", %s}", members);
    moe_vocab *vocab = open_vocab(source, NULL);
    take_begin(&t);
    moe_chat_parser *p =
        moe_chat_parser_open(vocab, request, strlen(request), take_piece, &t, &error);
    CHECKF(p, "%s: %s", request, error.text);
    if (p) {
        CHECK(push(p, text, strlen(text)) == MOE_OK && finish(p) == MOE_OK);
        CHECKF(!strcmp(t.texts[0].text, content) && !strcmp(t.texts[1].text, reasoning),
               "%s %s: %s, %s", source, request, t.texts[0].text, t.texts[1].text);
    }
    moe_chat_parser_close(p);
    take_end(&t);
    moe_vocab_close(vocab);
}

TEST(reasoning_goes_on_and_is_open_as_the_prompt_says) {
    static const char thinks[] =
        "{% for m in messages %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}"
        "\n</think>\n{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<think>\n{% if not on %}\n</think>\n\n{% endif %}{% "
        "endif %}";
    static const char harmony[] =
        "{% for m in messages %}<|start|>assistant{% if m.thinking %}<|channel|>analysis<|message|>"
        "{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final<|message|>"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% "
        "endif %}";
    check_goes_on(thinks, "\"content\": \"x\"}], \"on\": true", "R\n</think>\nC", "C", "R");
    check_goes_on(thinks, "\"content\": \"x\"}], \"on\": false", "C </think>", "C </think>", "");
    check_goes_on(thinks, "\"content\": \"x\"}], \"add_generation_prompt\": "
     "false", "<think>R</think>C",
                  "C", "R");
    check_goes_on(thinks, "\"content\": \"\", \"reasoning_content\": \"R\"}], "
                  "\"continue_final_message\": \"reasoning_content\"", " on\n</think>\n"
                  "C", "C", " on");
    check_goes_on(thinks, "\"content\": \"C\", \"reasoning_content\": \"R\"}], "
                  "\"continue_final_message\": true", " on", " on", "");
    check_goes_on(thinks, "\"content\": \"<think>R\"}], \"continue_final_message\": true",
                  " on</think>C", "C", " on");
    check_goes_on(harmony, "\"content\": \"C\"}], \"continue_final_message\": true",
                  " on<|end|>", " on", "");
    check_goes_on(harmony, "\"content\": \"C\", \"thinking\": \"R\"}], \"continue_final_message\": "
                  "\"thinking\"", " on<|end|><|start|>assistant<|channel|>final<"
                  "|message|>C", "C", " on");
    check_goes_on(harmony, "\"content\": \"C\"}]", "<|channel|>final<|message|>C", "C", "");
    // the template in the request
    check_goes_on(thinks, "\"content\": \"x\"}], \"chat_template\": \"[THINK]{{ 1 }}\"",
                  "[THINK]R[/THINK]C", "[THINK]R[/THINK]C", "");
    check_goes_on(thinks, "\"content\": \"x\"}], \"chat_template\": \"{% if 0 %}[TOOL_CALLS]{% "
     "endif "
                  "%}[THINK]\"", "R[/THINK]C", "C", "R");
    check_goes_on(NULL, "\"content\": \"x\"}]", "<think>R</think>C", "C", "R"); // ChatML
}

TEST(parsers_that_cannot_be_opened_say_why) {
    static const char *const requests[] = {"", "{}", "{\"messages\": 1}", "{\"messages\": []",
                                           "{\"messages\": [], \"chat_template\": \"{{\"}"};
    moe_vocab *vocab = open_vocab("{{ raise_exception('No.') if messages|length == 1 }}", NULL);
    moe_error error;
    taken t;
    for (int i = 0; i < 5; i++) {
        clear_error(&error);
        const size_t size = strlen(requests[i]);
        CHECK(!moe_chat_parser_open(vocab, requests[i], size, take_piece, &t, &error));
        CHECKF(error.status == (i < 4 ? MOE_ERROR_ARGUMENT : MOE_ERROR_FORMAT), "%d: %s", i,
               error.text);
    }
    static const char raises[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"\"}]}";
    CHECK(!moe_chat_parser_open(vocab, raises, strlen(raises), take_piece, &t, &error));
    CHECK(error.status == MOE_ERROR_ARGUMENT && !strcmp(error.text, "No."));
    CHECK(!moe_chat_parser_open(NULL, raises, strlen(raises), take_piece, &t, &error));
    CHECK(error.status == MOE_ERROR_ARGUMENT);
    CHECK(!moe_chat_parser_open(vocab, NULL, 0, take_piece, &t, &error));
    CHECK(!moe_chat_parser_open(vocab, raises, strlen(raises), NULL, &t, &error));
    CHECK(moe_chat_parser_push(NULL, "", 0) == MOE_ERROR_ARGUMENT);
    CHECK(moe_chat_parser_finish(NULL) == MOE_ERROR_ARGUMENT);
    moe_chat_parser_close(NULL);
    moe_vocab_close(vocab);
}

// ---- memory ----------------------------------------------------------------------------------

TEST(parsers_are_opened_without_memory) {
    static const char request[] = TOOLS;
    const size_t size = sizeof request - 1;
    meter m;
    memset(&m, 0, sizeof m);
    moe_allocator allocator = meter_allocator(&m);
    moe_vocab *vocab = open_vocab("{{ tools|tojson }}<think>", &allocator);
    const size_t live = m.live;
    moe_chat_parser *p = NULL;
    for (long at = 1; !p && at < 1000; at++) {
        moe_error error;
        m.calls = 0;
        m.fail_at = at;
        clear_error(&error);
        p = moe_chat_parser_open(vocab, request, size, take_piece, NULL, &error);
        CHECK(p || (error.status == MOE_ERROR_MEMORY && m.live == live));
    }
    CHECK(p != NULL);
    moe_chat_parser_close(p);
    CHECK(m.live == live);
    m.fail_at = 0;
    moe_vocab_close(vocab);
    CHECK(m.live == 0);
}

// Whatever allocation fails: an error, no leak, and the next answer comes out as from a new parser.
TEST(answers_without_memory) {
    uint64_t seed = 4;
    for (int i = 0; i < N_ANSWERS; i++) {
        const answer *a = &answers[i];
        const size_t size = strlen(a->text);
        for (long at = 1, done = 0; !done && at < 1000; at++) {
            meter m;
            transcript t;
            memset(&m, 0, sizeof m);
            memset(&t, 0, sizeof t);
            t.all_good = 1;
            m.fail_at = at;
            moe_chat_parser *p = open_parser(a, TOOLS, &m, &t);
            if (p) {
                moe_status status = moe_chat_parser_push(p, a->text, size / 2), second;
                second = moe_chat_parser_push(p, a->text + size / 2, size - size / 2);
                CHECK(status == MOE_OK || second == MOE_ERROR_MEMORY);
                status = moe_chat_parser_finish(p);
                CHECK(status == MOE_OK || status == MOE_ERROR_MEMORY);
                CHECK(second == MOE_OK || status == MOE_ERROR_MEMORY);
                done = m.calls < at;
                m.fail_at = 0;
                run(p, &t, a->text, size, 3, &seed);
                CHECKF(!strcmp(t.text, a->transcript), "%d %s, %ld: %s", i, a->form, at, t.text);
                moe_chat_parser_close(p);
            }
            CHECK(m.live == 0);
            free(t.text);
            free(t.args);
        }
    }
}

// ---- long answers ----------------------------------------------------------------------------

// What never ends: head, then part again and again.
static const struct {
    const char *form, *head, *part;
} endless[] = {
    {"usual", "", " "},
    {"usual", "a", " "},
    {"usual", "a", "<|im_end|>"},
    {"usual", "", "<"},
    {"usual", "", "{\"a\":"},
    {"usual", "", "<tool_call>"},
    {"usual", "<tool_call>", " "},
    {"usual", "<tool_call>", "["},
    {"usual", "<tool_call>", "a"},
    {"usual", "<tool_call>{\"", "a"},
    {"usual", "<tool_call>{\"name\"", " "},
    {"usual", "<tool_call>{\"name\": \"", "a"},
    {"usual", "<tool_call>{\"arguments\": {\"a\": \"", "a"},
    {"usual", "<tool_call>{\"name\": \"look\", \"arguments\": {\"town\": \"", "a"},
    {"usual", "<tool_call>{\"name\": \"look\", \"arguments\": {\"town\": [", "[],"},
    {"usual", "<tool_call>{\"name\": \"look\", \"arguments\": \"", "\\\\"},
    {"usual", "<tool_call>{\"name\": \"look\", \"id\": \"", "a"},
    {"usual", "<tool_call>{\"name\": \"look\", \"id\": ", "1"},
    {"usual", "<tool_call>{\"name\": \"look\", \"other\": \"", "a"},
    {"usual", "<tool_call>{\"name\": \"look\"},", " "},
    {"usual", "<tool_call>", "{\"name\": \"look\"}"},
    {"usual", "<tool_call>look\n<arg_key>", "a"},
    {"usual", "<tool_call>look\n<arg_key>town</arg_key><arg_value>", "a"},
    {"usual", "<tool_call>look\n<arg_key>town</arg_key><arg_value></arg_value>", " "},
    {"usual", "<tool_call>look\n<arg_key>new</arg_key><arg_value>", "a"},
    {"usual", "<tool_call>look\n<arg_key>n</arg_key><arg_value>", "1"},
    {"usual", "<tool_call>look\n", "<arg_key>n</arg_key><arg_value>1</arg_value>"},
    {"qwen", "<tool_call><function=look>", "<parameter=n>\nx"},
    {"qwen", "<tool_call><function=look><parameter=n>1</function>", "\n"},
    {"qwen", "<tool_call><function=", "a"},
    {"qwen", "<tool_call><function=look>", "stray "},
    {"minimax3", M3 "<tool_call>" M3 "<invoke name=\"look\">", M3 "<o>"},
    {"minimax3", M3 "<tool_call>" M3 "<invoke name=\"look\">" M3 "<n>", "1"},
    {"lfm2", "<|tool_call_start|>[look(town='", "a"},
    {"lfm2", "<|tool_call_start|>[look(town='a'", " "},
    {"lfm2", "<|tool_call_start|>[look(town=", "a"},
    {"lfm2", "<|tool_call_start|>[look(town=", "["},
    {"gemma", "<|tool_call>call:look{town:<|\"|>", "<|\""},
    {"harmony", "", " "},
    {"harmony", "<|channel|>", "a"},
    {"harmony", "", "<|channel|>analysis<|message|>"},
    {"kimi2", "<|tool_call_begin|>look:1<|tool_call_argument_begin|>", " "},
    {"deepseek", "<" BAR "tool" LOW "call" LOW "begin" BAR ">function<" BAR "t"
     "ool" LOW "sep" BAR ">",
     "a"},
    {"mistral", "[TOOL_CALLS]", "a"},
    {"mistral", "[TOOL_CALLS]look[ARGS]", "[ARGS]"},
};

static int count_piece(void *user, const moe_chat_piece *piece) {
    *(size_t *)user += piece->size;
    return 1;
}

static void push_endless(int i, size_t size, size_t step, meter *m) {
    const answer a = {endless[i].form, "", "", ""};
    char part[8192];
    size_t n = 0, out = 0, total = 0;
    transcript none;
    while (n + strlen(endless[i].part) <= step || !n) {
        memcpy(part + n, endless[i].part, strlen(endless[i].part));
        n += strlen(endless[i].part);
    }
    memset(m, 0, sizeof *m);
    moe_chat_parser *p = open_parser(&a, TOOLS, m, &none);
    CHECK(p != NULL);
    if (!p) return;
    p->on_piece = count_piece;
    p->user = &out;
    CHECK(push(p, endless[i].head, strlen(endless[i].head)) == MOE_OK);
    for (; total < size; total += n) CHECK(push(p, part, n) == MOE_OK);
    CHECK(finish(p) == MOE_OK);
    moe_chat_parser_close(p);
}

TEST(answers_that_never_end_take_bounded_memory) {
    meter m;
    for (int i = 0; i < (int)(sizeof endless / sizeof endless[0]); i++) {
        push_endless(i, 10 << 20, 4096, &m);
        CHECKF(m.peak < 6 << 20, "%s %s: %d bytes", endless[i].head, endless[i].part, (int)m.peak);
    }
}

// Where a bound is reached does not depend on the cuts either.
TEST(long_answers_come_apart_however_they_are_cut) {
    static const char *const ends[] = {"", "</tool_call>Q", "\"}}</tool_call>Q",
                                       "</arg_value></tool_call>Q"};
    uint64_t seed = 5;
    for (int i = 0; i < 4 * (int)(sizeof endless / sizeof endless[0]); i++) {
        const answer a = {endless[i / 4].form, "", "", ""};
        // around what may be held, and once around the longest value
        const size_t size = (i % 4 == 3 ? MOE__ANSWER_VALUE : MOE__ANSWER_HELD) - 100 +
                            (size_t)(moe__splitmix64(&seed) % 200);
        bytes text;
        meter m;
        transcript t, other;
        memset(&text, 0, sizeof text);
        memset(&m, 0, sizeof m);
        memset(&t, 0, sizeof t);
        memset(&other, 0, sizeof other);
        put(&text, endless[i / 4].head, strlen(endless[i / 4].head));
        while (text.size < size) put(&text, endless[i / 4].part, strlen(endless[i / 4].part));
        put(&text, ends[i % 4], strlen(ends[i % 4]));
        moe_chat_parser *p = open_parser(&a, TOOLS, &m, &t);
        if (!p) break;
        run(p, &t, text.text, text.size, text.size, &seed);
        p->user = &other;
        run(p, &other, text.text, text.size, i % 4 < 3 && i % 8 < 4, &seed);
        CHECKF(is_same(&t, &other) && t.all_good && other.all_good, "%s %s", a.form,
               endless[i / 4].head);
        CHECKF(count(t.text, t.size, 'Q') == count(text.text, text.size, 'Q'), "%s %s", a.form,
               endless[i / 4].head);
        moe_chat_parser_close(p);
        free(text.text);
        forget(&t);
        forget(&other);
        free(t.text);
        free(other.text);
    }
}

// verbose: what does not come back; fuzz N SEED: N broken answers and no other test
int main(int argc, char **argv) {
    char only[] = "broken_answers", *arguments[] = {argv[0], only};
    if (argc > 1 && !strcmp(argv[1], "verbose")) is_verbose = 1, argc = 1;
    if (argc < 3 || strcmp(argv[1], "fuzz")) return test_main(argc, argv);
    n_fuzz = atol(argv[2]) / 4;
    if (argc > 3) fuzz_seed = strtoull(argv[3], NULL, 10);
    return test_main(2, arguments);
}
