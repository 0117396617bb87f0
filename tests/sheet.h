// What the bits of every tensor type mean, once more: written from ../shared/spec/quants.md alone,
// one weight at a time, in double precision. Sizes come from the type table, which test_types holds
// against the sheet. A type that is missing here decodes to NaN. Also: random rows, their scales,
// and the comparison of sums. Include it behind moe_infer.h and test.h.
#ifndef SHEET_H
#define SHEET_H

enum { LAST_ISA = MOE_ISA_AVX_VNNI }; // the largest number of an instruction set

// ---- numbers ---------------------------------------------------------------------------------

static uint64_t sheet_seed = 1;
__attribute__((unused)) static uint32_t random_u32(void) {
    sheet_seed = sheet_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(sheet_seed >> 33) ^ (uint32_t)(sheet_seed >> 13);
}
__attribute__((unused)) static float random_f32(void) { // -1 .. 1
    return (float)((double)random_u32() / 2147483648.0 - 1);
}

static double sheet_half(const uint8_t *p) {
    int h = p[0] | p[1] << 8, exponent = h >> 10 & 31, fraction = h & 1023;
    double v = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    if (exponent == 31) v = fraction ? NAN : INFINITY;
    return h & 0x8000 ? -v : v;
}
static double sheet_f32(const uint8_t *p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}
static unsigned sheet_u16(const uint8_t *p) { return p[0] | (unsigned)p[1] << 8; }
static unsigned sheet_u32(const uint8_t *p) { return sheet_u16(p) | sheet_u16(p + 2) << 16; }
static int sheet_i8(int byte) { return byte < 128 ? byte : byte - 256; }
static int sheet_nib(int byte, int high) { return high ? byte >> 4 : byte & 15; }
static int sheet_bit(unsigned v, int i) { return (int)(v >> i & 1); }
static double sheet_ue4m3(int x) {
    int exponent = x >> 3 & 15, m = x & 7;
    if (x == 0 || x == 0x7F) return 0;
    return 0.5 * (exponent ? ldexp(1 + m / 8.0, exponent - 7) : ldexp(m, -9));
}

// ---- tables ----------------------------------------------------------------------------------

static const int sheet_fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const int sheet_k2[8] = {-31, -13, 1, 17, -26, -8, 6, 22};
static const int sheet_k3[16] = {-63, -40, -23, -10, 1, 13, 28, 47,
                                 -59, -36, -19, -6,  5, 17, 32, 51};
static const int sheet_k4[32] = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
    -123, -100, -79, -61, -45, -31, -18, -6,  5, 17, 29, 42, 57, 73, 93, 117};
static const int sheet_k5[64] = {
    -126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6,
    -1,   5,    11,   17,  23,  29,  36,  43,  51,  59,  68,  77,  87,  97,  109, 121,
    -124, -112, -101, -90, -81, -72, -63, -55, -48, -41, -34, -28, -22, -16, -10, -4,
    1,    7,    13,   19,  25,  31,  38,  45,  53,  61,  70,  79,  89,  99,  111, 123};
static const int sheet_k6[64] = {
    -127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54,
    -51,  -47,  -44,  -40,  -37,  -34, -31, -28, -25, -22, -19, -16, -13, -11, -8,  -5,
    -2,   0,    3,    6,    9,    12,  14,  17,  20,  23,  27,  30,  33,  36,  40,  44,
    47,   51,   55,   59,   63,   68,  72,  77,  82,  87,  92,  98,  103, 109, 115, 121};
static const uint16_t sheet_kl[32] = {
    0xe9c1, 0x0dc1, 0xc1d8, 0xf6d8, 0x0dd8, 0x2fd8, 0xd8e9, 0xe9e9, 0x01e9, 0x0de9, 0x1ce9,
    0xc1f6, 0x01f6, 0x0df6, 0x2ff6, 0xe901, 0xf601, 0x0101, 0x0d01, 0x1c01, 0xd80d, 0xe90d,
    0xf60d, 0x010d, 0x0d0d, 0xc11c, 0xe91c, 0x011c, 0x1c1c, 0x2f1c, 0xe92f, 0x0d2f};

// Code books, one line of the file each.
enum { IQ2XXS, IQ2XS, IQ2S, IQ3XXS, IQ3S, IQ1S, N_BOOKS };
static struct sheet_book {
    const char *name;
    int count, bits, alphabet[8];
    unsigned entry[2048];
} sheet_books[N_BOOKS] = {
    {"iq2xxs", 256, 2, {8, 25, 43}, {0}},
    {"iq2xs", 512, 2, {8, 25, 43}, {0}},
    {"iq2s", 1024, 2, {8, 25, 43}, {0}},
    {"iq3xxs", 256, 3, {4, 12, 20, 28, 36, 44, 52, 62}, {0}},
    {"iq3s", 512, 3, {1, 3, 5, 7, 9, 11, 13, 15}, {0}},
    {"iq1s", 2048, 2, {-1, 0, 1}, {0}},
};
// 1 if all books are there.
static int sheet_books_load(void) {
    static int state = -1;
    if (state >= 0) return state;
    FILE *file = fopen("../shared/spec/iq_grids.txt", "r");
    state = 0;
    if (!file) return 0;
    int found = 0;
    char word[32];
    while (fscanf(file, "%31s", word) == 1) {
        if (word[0] == '#' && fscanf(file, "%*[^\n]") == 0) continue;
        for (struct sheet_book *b = sheet_books; b < sheet_books + N_BOOKS; b++) {
            if (strcmp(word, b->name)) continue;
            int n = 0;
            while (n < b->count && fscanf(file, "%x", &b->entry[n]) == 1) n++;
            found += n == b->count;
        }
    }
    fclose(file);
    return state = found == N_BOOKS;
}
static int sheet_grid(int book, unsigned index, int i) {
    const struct sheet_book *b = &sheet_books[book];
    return b->alphabet[b->entry[index] >> b->bits * i & ((1u << b->bits) - 1)];
}
static int sheet_uses_book(moe_type type) {
    return strstr("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S ", moe_type_name(type)) != NULL;
}
// 0 if it cannot be decoded here for want of the books.
__attribute__((unused)) static int sheet_knows(moe_type type) {
    return !sheet_uses_book(type) || sheet_books_load();
}

static int sheet_sign(unsigned byte, int i) { return byte >> i & 1 ? -1 : 1; }
static unsigned sheet_s7(unsigned i) { // 7 bits and one that makes the number of ones even
    unsigned ones = 0;
    for (int k = 0; k < 7; k++) ones += i >> k & 1;
    return i | (ones & 1) << 7;
}

// ---- weights ---------------------------------------------------------------------------------

// A weight is value - min.
typedef struct sheet_pair {
    double value, min;
} sheet_pair;

// Scale and min number j of the 12 bytes of Q4_K and Q5_K.
static void sheet_scale_min(const uint8_t *s, int j, int *scale, int *min) {
    *scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    *min = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}
// 6-bit scale s of interleaved types: X(s; high, low).
static int sheet_x(const uint8_t *high, const uint8_t *low, int s) {
    return sheet_nib(low[s % 32], s / 32) | (high[s % 16] >> 2 * (s / 16) & 3) << 4;
}

// Weight `at` of row k of a group. product: as products count it (IQ6_K rounds its levels).
static sheet_pair sheet_parts(moe_type type, const uint8_t *group, int k, int64_t at, int product) {
    const moe__type *t = moe__type_find(type);
    const uint8_t *b = group + t->rows * t->meta + at / t->block * t->rows * t->bytes;
    const int e = (int)(at % t->block), i = e % 32, j = e / 32, s = e / 16, half = e / 128;
    const int l = i / 8, g = i / 4, i8 = e % 8, i4 = e % 4, c = e / 64, hi = e % 64 / 32;
    const int shift = 2 * (j % 4), two = 32 * half + i; // the usual place of 2-bit fields
    const double d = sheet_half(b + 2 * k);                  // where there is one at 0
    const double D = t->meta == 4 ? sheet_f32(group + 4 * k) : sheet_half(group + 2 * k);
    // interleaved rows: N4, T2, E3 of the sheet
    const int b4 = i / 16, b3 = i / 8 % 2, b2 = i / 4 % 2;
    const int n4 = 16 * (b4 + 2 * b2) + 4 * k + i4, t2 = 16 * b4 + 4 * k + i4, sh = 2 * (i / 4 % 4);
    const int e3 = 4 * k + i4, sr = 8 * j + 4 * b4 + k, extra_r = 8 + k + 4 * b4;
    const int eight = 32 * (e % 16 / 4) + 4 * k + i4; // 32-wide types of 8 rows
    sheet_pair w = {NAN, 0};
    int q, scale, min, high;
    unsigned v;
    switch ((int)type) {
    case MOE_TYPE_F32: w.value = sheet_f32(b); break;
    case MOE_TYPE_F16: w.value = sheet_half(b); break;
    case MOE_TYPE_BF16: {
        const uint8_t bits[4] = {0, 0, b[0], b[1]};
        w.value = sheet_f32(bits);
        break;
    }
    case MOE_TYPE_Q4_0: w.value = d * (sheet_nib(b[2 + e % 16], e / 16) - 8); break;
    case MOE_TYPE_Q4_1:
        w.value = d * sheet_nib(b[4 + e % 16], e / 16);
        w.min = -sheet_half(b + 2);
        break;
    case MOE_TYPE_Q5_0:
        q = sheet_nib(b[6 + e % 16], e / 16) | sheet_bit(sheet_u32(b + 2), e) << 4;
        w.value = d * (q - 16);
        break;
    case MOE_TYPE_Q5_1:
        q = sheet_nib(b[8 + e % 16], e / 16) | sheet_bit(sheet_u32(b + 4), e) << 4;
        w.value = d * q;
        w.min = -sheet_half(b + 2);
        break;
    case MOE_TYPE_Q6_0:
        high = b[2 + e % 8] >> (4 * (e % 16 / 8) + 2 * (e / 16)) & 3;
        w.value = d * ((sheet_nib(b[10 + e % 16], e / 16) | high << 4) - 32);
        break;
    case MOE_TYPE_Q8_0: w.value = d * sheet_i8(b[2 + e]); break;
    case MOE_TYPE_Q2_K:
        w.value = sheet_half(b + 80) * (b[s] & 15) * (b[16 + two] >> shift & 3);
        w.min = sheet_half(b + 82) * (b[s] >> 4);
        break;
    case MOE_TYPE_Q3_K:
        q = (b[32 + two] >> shift & 3) - (sheet_bit(b[i], j) ? 0 : 4);
        scale = sheet_nib(b[96 + s % 8], s / 8) | (b[104 + s % 4] >> 2 * (s / 4) & 3) << 4;
        w.value = sheet_half(b + 108) * (scale - 32) * q;
        break;
    case MOE_TYPE_Q4_K:
    case MOE_TYPE_Q5_K:
        sheet_scale_min(b + 4, j, &scale, &min);
        q = type == MOE_TYPE_Q4_K
                ? sheet_nib(b[16 + 32 * c + i], hi)
                : sheet_nib(b[48 + 32 * c + i], hi) | sheet_bit(b[16 + i], j) << 4;
        w.value = d * scale * q;
        w.min = sheet_half(b + 2) * min;
        break;
    case MOE_TYPE_Q6_K:
        q = sheet_nib(b[64 * half + 32 * (j % 4 & 1) + i], j % 4 >= 2) |
            (b[128 + two] >> shift & 3) << 4;
        w.value = sheet_half(b + 208) * sheet_i8(b[192 + s]) * (q - 32);
        break;
    case MOE_TYPE_IQ4_NL: w.value = d * sheet_k4[sheet_nib(b[2 + e % 16], e / 16)]; break;
    case MOE_TYPE_IQ4_XS:
        scale = sheet_nib(b[4 + j / 2], j % 2) | (int)(sheet_u16(b + 2) >> 2 * j & 3) << 4;
        w.value = d * (scale - 32) * sheet_k4[sheet_nib(b[8 + 16 * j + e % 16], b4)];
        break;
    case MOE_TYPE_MXFP4:
        w.value = ldexp(sheet_fp4[sheet_nib(b[1 + e % 16], e / 16)], b[0] - 128);
        break;
    case MOE_TYPE_NVFP4:
        w.value = sheet_ue4m3(b[s]) * sheet_fp4[sheet_nib(b[4 + 8 * s + e % 8], e % 16 / 8)];
        break;
    case MOE_TYPE_TQ1_0: {
        static const int power[] = {1, 3, 9, 27, 81};
        int n = e < 160 ? e / 32 : e < 240 ? (e - 160) / 16 : (e - 240) / 4;
        int byte = e < 160 ? b[e % 32] : e < 240 ? b[32 + (e - 160) % 16] : b[48 + (e - 240) % 4];
        w.value = sheet_half(b + 52) * ((3 * (byte * power[n] & 255) >> 8) - 1);
        break;
    }
    case MOE_TYPE_TQ2_0: w.value = sheet_half(b + 64) * ((b[two] >> shift & 3) - 1); break;
    case MOE_TYPE_IQ2_XXS:
        v = sheet_u32(b + 2 + 8 * j + 4);
        w.value = d * (0.5 + (v >> 28)) * 0.25 * sheet_grid(IQ2XXS, b[2 + 8 * j + l], i8) *
                  sheet_sign(sheet_s7(v >> 7 * l & 127), i8);
        break;
    case MOE_TYPE_IQ2_XS:
        v = sheet_u16(b + 2 + 2 * (4 * j + l));
        w.value = d * (0.5 + sheet_nib(b[66 + j], l >= 2)) * 0.25 *
                  sheet_grid(IQ2XS, v & 511, i8) * sheet_sign(sheet_s7(v >> 9), i8);
        break;
    case MOE_TYPE_IQ2_S:
        v = b[2 + 4 * j + l] | (b[66 + j] >> 2 * l & 3u) << 8;
        w.value = d * (0.5 + sheet_nib(b[74 + j], l >= 2)) * 0.25 * sheet_grid(IQ2S, v, i8) *
                  sheet_sign(b[34 + 4 * j + l], i8);
        break;
    case MOE_TYPE_IQ3_XXS:
        v = sheet_u32(b + 66 + 4 * j);
        w.value = d * (0.5 + (v >> 28)) * 0.5 * sheet_grid(IQ3XXS, b[2 + 8 * j + g], i4) *
                  sheet_sign(sheet_s7(v >> 7 * (g / 2) & 127), 4 * (g % 2) + i4);
        break;
    case MOE_TYPE_IQ3_S:
        v = b[2 + 8 * j + g] | (unsigned)sheet_bit(b[66 + j], g) << 8;
        w.value = d * (1 + 2 * sheet_nib(b[106 + j / 2], j % 2)) * sheet_grid(IQ3S, v, i4) *
                  sheet_sign(b[74 + 4 * j + g / 2], 4 * (g % 2) + i4);
        break;
    case MOE_TYPE_IQ1_S:
        v = sheet_u16(b + 34 + 2 * j);
        w.value = d * (2 * (v >> 12 & 7) + 1) *
                  (sheet_grid(IQ1S, b[2 + 4 * j + l] | (v >> 3 * l & 7) << 8, i8) +
                   (v & 0x8000 ? -0.125 : 0.125));
        break;
    case MOE_TYPE_IQ1_M: {
        unsigned sc[4];
        for (int n = 0; n < 4; n++) sc[n] = sheet_u16(b + 48 + 2 * n);
        v = sc[0] >> 12 | (sc[1] >> 8 & 0xF0) | (sc[2] >> 4 & 0xF00) | (sc[3] & 0xF000);
        const uint8_t bytes[2] = {(uint8_t)v, (uint8_t)(v >> 8)};
        v = (unsigned)sheet_nib(b[32 + 2 * j + l / 2], l % 2);
        w.value = sheet_half(bytes) * (2 * (sc[j / 2] >> (6 * (j % 2) + 3 * (l / 2)) & 7) + 1) *
                  (sheet_grid(IQ1S, b[4 * j + l] | (v & 7) << 8, i8) + (v & 8 ? -0.125 : 0.125));
        break;
    }
    case MOE_TYPE_IQ2_K:
        q = 4 * sheet_bit(sheet_u16(b + 2), s) + (b[12 + two] >> shift & 3);
        w.value = d * (sheet_nib(b[4 + j], b4) - 8) * sheet_k2[q];
        break;
    case MOE_TYPE_IQ3_K:
        q = (b[14 + two] >> shift & 3) | sheet_bit(b[78 + i], j) << 2;
        scale = 2 * sheet_nib(b[6 + j], b4) + 1;
        if (sheet_bit(sheet_u16(b + 4), s)) scale = -scale;
        w.value = d * scale * sheet_k3[8 * sheet_bit(sheet_u16(b + 2), s) + q];
        break;
    case MOE_TYPE_IQ4_K:
    case MOE_TYPE_IQ5_K:
        scale = sheet_nib(b[8 + s / 2], s % 2) | (b[4 + s / 4] >> 2 * (s % 4) & 3) << 4;
        high = sheet_bit(sheet_u16(b + 2), s);
        w.value = d * (scale - 32);
        if (type == MOE_TYPE_IQ4_K)
            w.value *= sheet_k4[16 * high + sheet_nib(b[16 + 16 * j + e % 16], b4)];
        else
            w.value *= sheet_k5[32 * high + (sheet_nib(b[16 + 32 * c + i], hi) |
                                             sheet_bit(b[144 + i], 2 * c + hi) << 4)];
        break;
    case MOE_TYPE_IQ6_K: {
        q = sheet_nib(b[20 + 32 * c + i], hi) |
            (b[148 + 32 * (c / 2) + i] >> (4 * (c % 2) + 2 * hi) & 3) << 4;
        double level = product ? sheet_k6[q]
                               : -127 + q * (6.2568 + q * (-0.11218 + q * 0.0011972));
        w.value = d * sheet_i8(b[4 + s]) * (level + sheet_bit(sheet_u16(b + 2), s));
        break;
    }
    case MOE_TYPE_IQ2_KS:
        scale = sheet_nib(b[2 + j / 2], j % 2) | sheet_bit(sheet_u16(b), 8 + j) << 4;
        q = 4 * sheet_bit(sheet_u16(b), j) + (b[6 + two] >> shift & 3);
        w.value = D * (scale - 16) * sheet_k2[q];
        break;
    case MOE_TYPE_IQ3_KS:
        scale = sheet_nib(b[2 + j % 4], j / 4) | sheet_bit(sheet_u16(b), j) << 4;
        q = (b[6 + two] >> shift & 3) | sheet_bit(b[70 + i], j) << 2;
        w.value = D * (scale - 16) * sheet_k3[8 * sheet_bit(sheet_u16(b), 8 + j) + q];
        break;
    case MOE_TYPE_IQ4_KS:
        q = 16 * (b[j] & 1) + sheet_nib(b[8 + 16 * j + e % 16], b4);
        w.value = D * ((b[j] & 254) - 127) * sheet_k4[q];
        break;
    case MOE_TYPE_IQ5_KS:
        q = sheet_nib(b[8 + 32 * c + i], hi) | sheet_bit(b[136 + i], j) << 4;
        w.value = D * ((b[j] & 254) - 127) * sheet_k5[32 * (b[j] & 1) + q];
        break;
    case MOE_TYPE_IQ2_KL:
        scale = sheet_nib(b[2 + j % 4], j / 4) | (int)(sheet_u16(b) >> 2 * j & 3) << 4;
        q = sheet_nib(b[6 + 16 * c + i / 2], j % 2) | sheet_bit(b[70 + i / 2], j) << 4;
        w.value = D * (scale - 32) * sheet_i8(sheet_kl[q] >> 8 * (e % 2) & 255);
        break;
    case MOE_TYPE_Q4_0_R8: w.value = d * (sheet_nib(b[16 + eight], e / 16) - 8); break;
    case MOE_TYPE_Q8_0_R8: w.value = d * sheet_i8(b[16 + 128 * (e / 16) + eight]); break;
    case MOE_TYPE_MXFP4_R8:
        w.value = ldexp(sheet_fp4[sheet_nib(b[8 + eight], e / 16)], b[k] - 128);
        break;
    case MOE_TYPE_IQ4_NL_R4: w.value = d * sheet_k4[sheet_nib(b[8 + n4], b3)]; break;
    case MOE_TYPE_Q5_0_R4:
        q = sheet_nib(b[24 + n4], b3) | sheet_bit(b[8 + e3], b4 + 2 * b2 + 4 * b3) << 4;
        w.value = d * (q - 16);
        break;
    case MOE_TYPE_Q2_K_R4:
        scale = b[16 + sr];
        w.value = d * (scale & 15) * (b[80 + 32 * j + t2] >> sh & 3);
        w.min = sheet_half(b + 8 + 2 * k) * (scale >> 4);
        break;
    case MOE_TYPE_Q3_K_R4:
        q = (b[184 + 32 * j + t2] >> sh & 3) | sheet_bit(b[56 + 16 * j + e3], g) << 2;
        w.value = d * (sheet_x(b + 8, b + 24, sr) - 32) * (q - 4);
        break;
    case MOE_TYPE_Q4_K_R4:
    case MOE_TYPE_Q5_K_R4: {
        int at_scale = 4 * j + k;
        high = b[16 + at_scale % 16] >> 4 * (at_scale / 16);
        scale = (b[32 + at_scale] & 15) | (high & 3) << 4;
        min = b[32 + at_scale] >> 4 | (high >> 2 & 3) << 4;
        q = type == MOE_TYPE_Q4_K_R4 ? sheet_nib(b[64 + 64 * j + n4], b3)
                                     : sheet_nib(b[192 + 64 * j + n4], b3) |
                  sheet_bit(b[64 + 16 * j + e3], 4 * b4 + 2 * b2 + b3) << 4;
        w.value = d * scale * q;
        w.min = sheet_half(b + 8 + 2 * k) * min;
        break;
    }
    case MOE_TYPE_Q6_K_R4:
        q = sheet_nib(b[328 + 64 * j + n4], b3) |
            (b[72 + 32 * j + t2] >> (4 * b2 + 2 * b3) & 3) << 4;
        w.value = d * sheet_i8(b[8 + sr]) * (q - 32);
        break;
    case MOE_TYPE_IQ2_K_R4:
        q = 4 * sheet_bit(b[extra_r], j) + (b[48 + 32 * j + t2] >> sh & 3);
        w.value = d * (sheet_nib(b[16 + sr % 32], sr / 32) - 8) * sheet_k2[q];
        break;
    case MOE_TYPE_IQ3_K_R4:
        q = (b[56 + 32 * j + t2] >> sh & 3) | sheet_bit(b[312 + 16 * j + e3], g) << 2;
        scale = 2 * sheet_nib(b[24 + sr % 32], sr / 32) + 1;
        if (sheet_bit(b[16 + sr % 8], sr / 8)) scale = -scale;
        w.value = d * scale * sheet_k3[8 * sheet_bit(b[extra_r], j) + q];
        break;
    case MOE_TYPE_IQ4_K_R4:
        q = 16 * sheet_bit(b[extra_r], j) + sheet_nib(b[64 + 64 * j + n4], b3);
        w.value = d * (sheet_x(b + 16, b + 32, sr) - 32) * sheet_k4[q];
        break;
    case MOE_TYPE_IQ5_K_R4:
        q = sheet_nib(b[64 + 64 * j + n4], b3) |
            sheet_bit(b[576 + 16 * j + e3], 4 * b2 + 2 * b4 + b3) << 4;
        w.value = d * (sheet_x(b + 16, b + 32, sr) - 32) *
                  sheet_k5[32 * sheet_bit(b[extra_r], j) + q];
        break;
    case MOE_TYPE_IQ4_KS_R4:
        scale = b[4 * j + k];
        w.value = D * ((scale & 254) - 127) *
                  sheet_k4[16 * (scale & 1) + sheet_nib(b[32 + 64 * j + n4], b3)];
        break;
    case MOE_TYPE_IQ5_KS_R4:
        scale = b[4 * j + k];
        q = sheet_nib(b[32 + 64 * j + n4], b3) |
            sheet_bit(b[544 + 16 * j + e3], 4 * b2 + 2 * b4 + b3) << 4;
        w.value = D * ((scale & 254) - 127) * sheet_k5[32 * (scale & 1) + q];
        break;
    case MOE_TYPE_IQ4_XS_R8:
        q = sheet_nib(b[64 + 128 * j + 32 * (i / 8) + 4 * k + i4], g % 2);
        w.value = d * (sheet_x(b + 16, b + 32, 8 * j + k) - 32) * sheet_k4[q];
        break;
    default: break;
    }
    return w;
}

__attribute__((unused)) static double sheet_weight(moe_type type, const uint8_t *group, int k,
                                                   int64_t e) {
    sheet_pair w = sheet_parts(type, group, k, e, 0);
    return w.value - w.min;
}

// ---- scales ----------------------------------------------------------------------------------

static void sheet_put_half(uint8_t *p, float x) { moe__store_u16(p, moe__f32_to_f16(x)); }

// 1 if the scales of a type can be NaN or infinity.
__attribute__((unused)) static int sheet_may_be_nan(const moe__type *t) {
    return t->id != MOE_TYPE_MXFP4 && t->id != MOE_TYPE_MXFP4_R8 && t->id != MOE_TYPE_NVFP4;
}
// Offset in a row's block of its second f16, by which a min or the like is multiplied; or -1.
static int sheet_min_offset(const moe__type *t, int k) {
    switch ((int)t->id) {
    case MOE_TYPE_Q2_K: return 82;
    case MOE_TYPE_Q4_1:
    case MOE_TYPE_Q5_1:
    case MOE_TYPE_Q4_K:
    case MOE_TYPE_Q5_K: return 2;
    case MOE_TYPE_Q2_K_R4:
    case MOE_TYPE_Q4_K_R4:
    case MOE_TYPE_Q5_K_R4: return 8 + 2 * k;
    default: return -1;
    }
}
// Sets the scale (a power of two where a type has nothing else) and the factor of the mins of a
// block of row k of a group; of types with one scale per row, that one. Of F32, F16 and BF16: the
// weight.
static void sheet_put(const moe__type *t, uint8_t *group, int k, int64_t block, float d, float m) {
    uint8_t *b = group + t->rows * t->meta + block * t->rows * t->bytes;
    int at = 2 * k, exponent = d != 0 ? ilogbf(d) : -10;
    if (t->meta == 4) memcpy(group + 4 * k, &d, 4);
    if (t->meta == 2) sheet_put_half(group + 2 * k, d);
    if (t->meta) return;
    switch ((int)t->id) {
    case MOE_TYPE_F32: memcpy(b, &d, 4); return;
    case MOE_TYPE_BF16: moe__store_u16(b, moe__f32_to_bf16(d)); return;
    case MOE_TYPE_MXFP4:
    case MOE_TYPE_MXFP4_R8: b[k] = (uint8_t)(128 + exponent); return;
    case MOE_TYPE_NVFP4:
        for (int i = 0; i < 4; i++)
            b[i] = (uint8_t)((b[i] & 7 & -(d != 1)) | moe__min(15, moe__max(0, exponent + 8)) << 3);
        return;
    case MOE_TYPE_IQ1_M:
        for (int i = 0; i < 4; i++)
            b[49 + 2 * i] = (uint8_t)((b[49 + 2 * i] & 15) |
                                      (moe__f32_to_f16(d) >> 4 * i & 15) << 4);
        return;
    case MOE_TYPE_Q2_K: at = 80; break;
    case MOE_TYPE_Q3_K: at = 108; break;
    case MOE_TYPE_Q6_K: at = 208; break;
    case MOE_TYPE_TQ1_0: at = 52; break;
    case MOE_TYPE_TQ2_0: at = 64; break;
    default: break;
    }
    sheet_put_half(b + at, d);
    if ((at = sheet_min_offset(t, k)) >= 0) sheet_put_half(b + at, m);
}
// The same for all blocks of `n_rows` rows. d 0: random ones, -0.1 .. 0.1.
__attribute__((unused)) static void sheet_put_all(const moe__type *t, uint8_t *rows,
                                                  size_t row_size, int n_rows, int64_t n, float d) {
    for (int r = 0; r < n_rows; r++)
        for (int64_t b = 0; b < n / t->block; b++) {
            const float m = d != 0 ? d : random_f32() * 0.1f;
            sheet_put(t, rows + (size_t)(r - r % t->rows) * row_size, r % t->rows, b,
                      d != 0 ? d : random_f32() * 0.1f, m);
        }
}
// Fills rows with random bits and scales as above. Floats: -1 .. 1, or if d is not 0, integers.
__attribute__((unused)) static void sheet_random(const moe__type *t, uint8_t *rows, size_t row_size,
                                                 int n_rows, int64_t n, float d) {
    for (size_t i = 0; i < (size_t)n_rows * row_size; i++) rows[i] = (uint8_t)random_u32();
    if (t->block > 1) sheet_put_all(t, rows, row_size, n_rows, n, d);
    for (int r = 0; r < n_rows && t->block == 1; r++)
        for (int64_t i = 0; i < n; i++)
            sheet_put(t, rows + (size_t)r * row_size, 0, i,
                      d != 0 ? (float)((int)(random_u32() % 201) - 100) : random_f32(), 0);
}

// ---- activations and products ----------------------------------------------------------------

// Value i of activations.
static double sheet_act(moe__act_kind kind, const void *act, int64_t i) {
    const moe__act32 *a32 = (const moe__act32 *)act + i / 256;
    const moe__act256 *a256 = (const moe__act256 *)act + i / 256;
    if (kind == MOE__ACT_Q32) return (double)a32->d[i % 256 / 32] * a32->q[moe__act32_at((int)(i % 256))];
    if (kind == MOE__ACT_Q256) return (double)a256->d * a256->q[moe__act256_at((int)(i % 256))];
    return ((const float *)act)[i];
}

// Row k of a group times activations; terms: the sum of what the terms consist of, all positive.
__attribute__((unused)) static double sheet_dot(const moe__type *t, const uint8_t *group, int k,
                                                int64_t n, const void *act, double *terms) {
    double sum = 0;
    *terms = 0;
    for (int64_t e = 0; e < n; e++) {
        sheet_pair w = sheet_parts(t->id, group, k, e, 1);
        double a = sheet_act(t->act, act, e);
        sum += (w.value - w.min) * a;
        *terms += (fabs(w.value) + fabs(w.min)) * fabs(a);
    }
    return sum;
}

#endif
