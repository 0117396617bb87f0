/* SPDX-License-Identifier: MIT OR Unlicense (texts at the end of the file) */
#if !defined(__cplusplus) && defined(__STRICT_ANSI__) && \
    (!defined(__STDC_VERSION__) || __STDC_VERSION__ < 199901L)
#error "moe_infer.h needs C99 or later: -std=gnu11, for instance"
#pragma GCC system_header /* no warnings about comments that C90 cannot read */
#elif !defined(MOE__ISA)
#ifndef MOE_INFER_H
#define MOE_INFER_H

// ==============================================================================================
//                                    MOE_INFER.H
//
// moe_infer.h 0.1 - runs Mixture-of-Experts language models from GGUF files on a CPU.
//
// One file, no dependency but libc and pthreads. In one C or C++ file of your program:
//
//     #define MOE_INFER_IMPLEMENTATION
//     #include "moe_infer.h"
//
// In the others only the #include. Build: cc -O2 app.c -lm -lpthread. No -march is needed: the
// kernels for AVX2, AVX-VNNI and AVX-512 are compiled in and chosen when the program runs.
//
// The rooms of this file, each opened by its tag; a room calls only rooms above it:
//
//   >>manual   how to use it: models, sessions, threads, schedules, errors, limits
//   >>config   every macro you may define
//   >>api      types and prototypes with their contracts
//   >>base     compiler macros, UTF-8, errors, memory, checked sizes, small floats, heaps
//   >>machine  processors, cores, quotas, free memory, memory nodes; binding to them
//   >>pool     the team of threads: wake, barrier, ranges of work
//   >>pages    files in memory: mapped or copied, huge pages found, measured and made
//   >>gguf     reading GGUF files: bounded reader, metadata, tensor table, split files
//   >>types    tensor types: dequantize (the specification), quantize, plain C dot
//   >>kernels  inner loops: plain C, then one vector text per instruction set
//   >>ops      matrix products, rotary positions
//   >>experts  router, plan, the expert schedules
//   >>text     Unicode tables, pre-tokenizers, byte-pair encoding
//   >>model    hyper-parameters, the table of families, how tensors are bound
//   >>cache    what a sequence remembers
//   >>batch    rows of several sequences, their buffers, steps shared by threads
//   >>mixers   attention: grouped queries, latent; the table of mixers
//   >>load     opening a model, placing its weights
//   >>session  the forward pass, sessions
//   >>sample   choosing tokens, generating text
//   >>licence  MIT or public domain
//
// To add one more of a kind, touch what mentions one that is there, and nothing else (tests/map.sh
// holds these lists against the file; * stands for any ending):
//
//   a tensor type, as iq4_xs: moe_type, MOE__ALL_TYPES, MOE__LAYOUT_IQ4_XS; if it can be made,
//     MOE__TYPES_QUANTIZE, moe__types_pack_iq4_xs; see also the page that tensor types begin with
//   an instruction set, as avx_vnni: >>config, moe_isa*, MOE__SUFFIX, MOE__ISA,
//     moe__kernels_detect, moe__kernels_get; also MOE__TARGET
//   an expert schedule, as balanced: >>config if a macro is to choose it, moe_schedule,
//     moe__schedule_balanced*, moe__schedules, moe__schedule_find
//   a mixer of tokens, as gqa: moe__mixer_id, moe__families that use it, moe__gqa*, moe__mixers; if
//     it attends, moe__attention*; also moe__layer for what its layers hold, moe__input for vectors
//     that only its matrices read, moe__cache_shape for what it keeps
//   a model family, as "olmoe": moe__families; what is new about it becomes a feature that any
//     family may have, read by the one forward pass; also moe__has
//   a pre-tokenizer, as tekken: MOE__PASS, moe__text_pres
//   a type of cache, as kv_q8_0: moe_kv_type, moe__kv_bytes, moe__session_configure and, for
//     attention, moe__attend_load, kv_*, score_tile*, MOE__SCORE_TILE, value_*, MOE__VALUE_TILE,
//     step_floats, attend*; also moe__kv_store, moe__mla_expand
// ==============================================================================================

// ==============================================================================================
// >>manual
//
// QUICK START
//
//     moe_error error;
//     moe_model *model = moe_model_open("model.gguf", NULL, &error);
//     moe_session *session = model ? moe_session_open(model, NULL, &error) : NULL;
//     if (!session) fail(error.text);
//     moe_generate_options options = {.max_tokens = 100, .on_text = print};
//     moe_generate_text(session, "Once upon a time", &options, NULL, &error);
//
// One step lower, moe_vocab_tokenize makes tokens of a text and moe_generate goes on from them.
// Lower still, moe_session_eval appends tokens to the context, moe_session_logits gives what
// follows each of them, moe_sampler_sample chooses, moe_vocab_text gives a token's bytes, and
// moe_session_rewind forgets.
//
// MODELS. A model is a GGUF file (or the first of several parts) mapped into memory: weights are
// read where they lie, so that loading takes milliseconds and processes share pages. A file is
// treated as hostile; what cannot be run right is refused with the reason, and so is a file with
// tensors that its family has no use for. An open model never changes: any number of sessions in
// any threads may use it. It must outlive them.
//
// PAGES. On most machines a mapped file is read as fast as any memory. On some (virtual machines
// whose hypervisor keeps page tables of its own) the speed depends on the units in which the
// system happens to cache the file, by up to ten times. With moe_model_options.pages = AUTO,
// opening a model measures a sample for some milliseconds and, only if the mapping is slow and
// at least twice as much memory is free, makes a private copy of it in huge pages. The mapping
// is looked at again after two seconds of generating, then less and less often; if it has become
// slow, it is copied bit by bit between tokens. moe_model_get_memory says in words what was done.
// MAP never copies, COPY always.
//
// SESSIONS. A session is one context: its cache of keys and values. One thread at a time may
// call it. All memory is taken when it is opened (ask moe_session_estimate before), but what a
// context has not reached yet is not touched; evaluating allocates nothing. A failed or
// cancelled eval leaves the session as it was, logits included. Sessions of one pool share the
// buffers for a batch; moe_session_eval_many evaluates several of them in one pass, reading each
// weight once.
//
// THREADS. A session's team is made with it, or shared through moe_pool; threads sleep between
// evals. Sessions with pools of their own run at the same time; those of one pool take turns.
// Callbacks run on the calling thread and must return: an exception or a longjmp through the
// library leaves the pool locked. should_stop runs in the middle of an eval: it can neither
// evaluate with the same pool nor rewind a session that is being evaluated. on_text runs between
// evals: it may do both, and generating goes on behind what it leaves. A program that forks must
// not use the child's copy of a session. A calling thread needs 128 KiB of stack (without
// optimization 512).
//
// BITS. A token's logits depend on the tokens before it alone: they have the same bits for any
// number of threads, any schedule, any other sequences in the batch, and any cut of the input
// into evals or batches. One exception: layers with latent attention expand keys in evals of 128
// tokens and more (if n_batch is as large) and round differently there: such evals agree with
// each other. All this is with one instruction set and type of cache, see PRECISION. The
// caller's floating-point environment (rounding, small numbers flushed to zero) has no part in
// it, and is as before when a call returns.
//
// MEMORY NODES. On a machine of several sockets open the model with numa = MOE_NUMA_OWNER, best
// with pages = COPY: threads are pinned in blocks, and a row of a matrix lies in the memory of
// the socket that reads it. MOE_NUMA_INTERLEAVE suits threads that move. moe_model_get_memory
// tells what came of it. On one socket neither does anything.
//
// PRECISION. Weights of 32- and 256-wide block types are multiplied with activations quantized
// to int8 in blocks of the same width, in exact integers; F32, F16 and BF16 weights with floats.
// Everything else is f32. The cache holds f16, f32 or Q8_0 (half of f16). A product has the same
// bits for one token and for many, that of quantized weights also from every instruction set
// ("the product of quantized rows" in >>types is the arithmetic); the rest differs in the last
// bits of float sums only. Plain C gives the same bits on every processor and from every
// compiler, but for clang with -ffp-contract=fast and what the C library's expf makes of it.
//
// EXPERT SCHEDULES. In a MoE layer each token needs a few experts; three matrices each. Threads
// may share that work in different ways, picked by macro or moe_session_options.schedule. Rows
// of the active experts' matrices, one token, 4 threads (0-3):
//
//   sequential (default)       expert    3         17        42        51
//   all threads on one expert  rows      00112233  00112233  00112233  00112233
//   after another. A thread's rows are the same for every expert; nobody waits between experts.
//
//   parallel                   expert    3         17        42        51
//   experts at the same time   rows      00000000  11111111  22222222  33333333
//   Groups of threads, as many as the greatest common divisor of active experts and threads.
//   For one token; if the divisor is 1, and in prompts, it is sequential.
//
//   balanced                   expert    3         17        42        51
//   one list, cut evenly       rows      001123    012233    001123    012233
//   When rows do not divide by threads, who gets one more rotates from expert to expert, among
//   the threads of a memory node: which node reads a row never changes. In prompts gate and up
//   are one list of row blocks, cut where the work is even.
//
// All three give the same bits. Where two threads compute the same row of down for different
// experts, results are added up behind one more barrier: always with parallel, with balanced
// only if pairs of rows divide badly by threads, as few rows do by very many.
//
// ERRORS. Calls return a moe_status or NULL and fill a moe_error with the place and a sentence.
// The library never exits, aborts, prints, installs handlers, reads the environment or keeps
// global state (the code books of the IQ types are unpacked once and constant from then on). One
// thing it cannot turn into an error: a mapped file that is cut short by somebody else while in
// use raises SIGBUS; pages = MOE_PAGES_COPY avoids that.
//
// LIMITS. Little-endian 64-bit machines with GCC or clang. Up to 512 layers and 512 experts,
// 1024 threads. Not for -ffast-math (infinities are used).
// ==============================================================================================

// ==============================================================================================
// >>config
//
// Every macro a user may define before including this file. Nothing else configures it. Each is
// normalised to 0 or 1 here and tested with #if below, so that -Wundef finds a mistyped one.
// ==============================================================================================

// MOE_INFER_IMPLEMENTATION  define it in exactly one file: the function bodies appear there.
// MOE_INFER_STATIC          functions become static: several files may each hold a private copy.
// MOE_API                   prefix of every public function; default extern (C linkage) / static
// MOE_INFER_HEADER          name of this file, "moe_infer.h": define it if you rename the file.
// MOE_ASSERT(x)             checks of the library's own logic; default: nothing. Input from
//                           files and callers is never checked by it.
// MOE_NO_AVX2               leave out the AVX2 kernels (and the AVX-512 ones).
// MOE_NO_AVX512             leave out the AVX-512 kernels.
// MOE_NO_AVX_VNNI           leave out the AVX-VNNI kernels (GCC before 11 has none anyway).
// MOE_NO_FUTEX              pthread condition variables instead of the Linux futex.
// MOE_PARALLEL_EXPERTS      MOE_SCHEDULE_DEFAULT means MOE_SCHEDULE_PARALLEL.
// MOE_BALANCED_EXPERTS      MOE_SCHEDULE_DEFAULT means MOE_SCHEDULE_BALANCED.

#ifndef MOE_INFER_HEADER
#define MOE_INFER_HEADER "moe_infer.h"
#endif

#if defined(MOE_INFER_STATIC)
#define MOE__STATIC 1
#else
#define MOE__STATIC 0
#endif

#ifndef MOE_API
#if MOE__STATIC
#define MOE_API static __attribute__((unused))
#else
#define MOE_API extern
#endif
#endif

#ifndef MOE_ASSERT
#define MOE_ASSERT(x) ((void)0)
#endif

// `#define MOE_NO_AVX2`, `-DMOE_NO_AVX2` (= 1) and `-DMOE_NO_AVX2=0` all mean what they say.
#define MOE__IS_ON(x) (MOE__IS_ON_(x))
#define MOE__IS_ON_(x) (x + 1 != 1 || 0 - x - 1 == 1)

#if defined(MOE_NO_AVX2) && MOE__IS_ON(MOE_NO_AVX2)
#define MOE__USE_AVX2 0
#else
#define MOE__USE_AVX2 1
#endif
#if (defined(MOE_NO_AVX512) && MOE__IS_ON(MOE_NO_AVX512)) || !MOE__USE_AVX2
#define MOE__USE_AVX512 0
#else
#define MOE__USE_AVX512 1
#endif
// The AVX-VNNI kernels may be tried on a machine with AVX-512 only: MOE__VNNI_EVEX = 1.
#ifndef MOE__VNNI_EVEX
#define MOE__VNNI_EVEX 0
#endif
#if defined(__clang__)
#define MOE__HAS_AVX_VNNI (__clang_major__ >= 12)
#elif defined(__GNUC__)
#define MOE__HAS_AVX_VNNI (__GNUC__ >= 11)
#else
#define MOE__HAS_AVX_VNNI 0
#endif
#if (defined(MOE_NO_AVX_VNNI) && MOE__IS_ON(MOE_NO_AVX_VNNI)) || !MOE__USE_AVX2
#define MOE__USE_AVX_VNNI 0
#else
#define MOE__USE_AVX_VNNI MOE__HAS_AVX_VNNI
#endif
#if (defined(MOE_NO_FUTEX) && MOE__IS_ON(MOE_NO_FUTEX)) || !defined(__linux__)
#define MOE__USE_FUTEX 0
#else
#define MOE__USE_FUTEX 1
#endif
#if defined(MOE_PARALLEL_EXPERTS) && MOE__IS_ON(MOE_PARALLEL_EXPERTS)
#define MOE__PARALLEL_EXPERTS 1
#else
#define MOE__PARALLEL_EXPERTS 0
#endif
#if defined(MOE_BALANCED_EXPERTS) && MOE__IS_ON(MOE_BALANCED_EXPERTS)
#define MOE__BALANCED_EXPERTS 1
#else
#define MOE__BALANCED_EXPERTS 0
#endif
#if MOE__PARALLEL_EXPERTS && MOE__BALANCED_EXPERTS
#error "define MOE_PARALLEL_EXPERTS or MOE_BALANCED_EXPERTS, not both"
#endif

// ==============================================================================================
// >>api
//
// Types and prototypes with their contracts. Conventions:
// - Option structs are passed by pointer; NULL or a zeroed struct means defaults, because every
//   default is the value 0. A switch is MOE_ON, MOE_OFF or 0 (default).
// - A fallible call takes a moe_error * (may be NULL). On failure it is filled; on success it is
//   left alone. Constructors return NULL on failure. Closing NULL does nothing.
// - Options are copied. What they point to (user data of callbacks, stop strings) must stay for as
//   long as the call or the object made by it; whatever else a call is given, until it returns.
// - A session or a sampler may be used by one thread at a time; an open moe_gguf, moe_model,
//   moe_vocab and moe_pool by any number. What a call returns by pointer belongs to the object and
//   is valid until that is closed, unless the comment says less.
// - Shapes are written in GGUF's order {fastest, ..., slowest}: a matrix {n_in, n_out} maps
//   n_in inputs to n_out outputs and its rows (n_in weights each) lie one after another.
// ==============================================================================================

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0

enum { MOE_OFF = -1, MOE_ON = 1 };

// ---- errors ----------------------------------------------------------------------------------

typedef enum moe_status {
    MOE_OK,
    MOE_ERROR_ARGUMENT,     // a call's argument is wrong: NULL, out of range, token id unknown
    MOE_ERROR_MEMORY,       // the allocator returned NULL
    MOE_ERROR_IO,           // the file cannot be opened, read or mapped
    MOE_ERROR_FORMAT,       // the file breaks the rules of GGUF or contradicts itself
    MOE_ERROR_UNSUPPORTED,  // the file is sound, but this library cannot run it right
    MOE_ERROR_CONTEXT_FULL, // the tokens do not fit into n_ctx
    MOE_ERROR_CANCELLED,    // a callback asked to stop
    MOE_ERROR_THREAD        // the operating system refused a thread
} moe_status;

// What went wrong, and where. Strings are NUL-terminated UTF-8, cut if too long; bytes of a file
// that are not UTF-8, or that a terminal might obey, are quoted as '?'.
typedef struct moe_error {
    moe_status status;
    uint64_t offset; // byte offset in the file if the error lies in one, else 0
    char where[64];  // metadata key, tensor, file or argument name; may be empty
    char text[192];  // one sentence
} moe_error;

// "MOE_ERROR_FORMAT" etc.; never NULL.
MOE_API const char *moe_status_name(moe_status status);

// ---- memory ----------------------------------------------------------------------------------

// Where the library gets its memory. alloc returns NULL or `size` bytes aligned to 16; free gets
// the same size back. Both may be called from the thread that calls into the library only, and
// never while evaluating. Zeroed: malloc and free.
typedef struct moe_allocator {
    void *(*alloc)(void *user, size_t size);
    void (*free)(void *user, void *memory, size_t size);
    void *user;
} moe_allocator;

// ---- tensor types ----------------------------------------------------------------------------

// Values are GGUF's type ids. Rows of a quantized type are made of blocks of 32 or 256 weights.
typedef enum moe_type {
    MOE_TYPE_F32 = 0, MOE_TYPE_F16 = 1, MOE_TYPE_Q4_0 = 2, MOE_TYPE_Q4_1 = 3, MOE_TYPE_Q5_0 = 6,
    MOE_TYPE_Q5_1 = 7, MOE_TYPE_Q8_0 = 8, MOE_TYPE_Q2_K = 10, MOE_TYPE_Q3_K = 11,
    MOE_TYPE_Q4_K = 12, MOE_TYPE_Q5_K = 13, MOE_TYPE_Q6_K = 14, MOE_TYPE_IQ2_XXS = 16,
    MOE_TYPE_IQ2_XS = 17, MOE_TYPE_IQ3_XXS = 18, MOE_TYPE_IQ1_S = 19, MOE_TYPE_IQ4_NL = 20,
    MOE_TYPE_IQ3_S = 21, MOE_TYPE_IQ2_S = 22, MOE_TYPE_IQ4_XS = 23, MOE_TYPE_IQ1_M = 29,
    MOE_TYPE_BF16 = 30, MOE_TYPE_TQ1_0 = 34, MOE_TYPE_TQ2_0 = 35, MOE_TYPE_MXFP4 = 39,
    MOE_TYPE_NVFP4 = 40, MOE_TYPE_Q6_0 = 133, MOE_TYPE_IQ2_K = 137, MOE_TYPE_IQ3_K = 138,
    MOE_TYPE_IQ4_K = 139, MOE_TYPE_IQ5_K = 140, MOE_TYPE_IQ6_K = 141, MOE_TYPE_IQ4_KS = 144,
    MOE_TYPE_IQ2_KS = 145, MOE_TYPE_IQ5_KS = 152, MOE_TYPE_IQ3_KS = 156, MOE_TYPE_IQ2_KL = 157,
    MOE_TYPE_Q4_0_R8 = 202, MOE_TYPE_Q5_0_R4 = 206, MOE_TYPE_Q8_0_R8 = 208, MOE_TYPE_Q2_K_R4 = 210,
    MOE_TYPE_Q3_K_R4 = 211, MOE_TYPE_Q4_K_R4 = 212, MOE_TYPE_Q5_K_R4 = 213, MOE_TYPE_Q6_K_R4 = 214,
    MOE_TYPE_IQ4_NL_R4 = 220, MOE_TYPE_IQ4_XS_R8 = 223, MOE_TYPE_IQ2_K_R4 = 337,
    MOE_TYPE_IQ3_K_R4 = 338, MOE_TYPE_IQ4_K_R4 = 339, MOE_TYPE_IQ5_K_R4 = 340,
    MOE_TYPE_IQ4_KS_R4 = 344, MOE_TYPE_IQ5_KS_R4 = 352, MOE_TYPE_MXFP4_R8 = 353,
    MOE_TYPE_ANY_ID = 0x7FFFFFFF // no type: makes room for every id that a file may hold
} moe_type;

// "Q4_K", "F32", ...; for GGUF ids that this library knows but cannot compute with, their name
// too; "?" for an unknown id.
MOE_API const char *moe_type_name(moe_type type);
// Non-zero if models with tensors of this type can be run.
MOE_API int moe_type_supported(moe_type type);
// Weights per block (1, 32, 64, 128, 256), 0 for an unknown type.
MOE_API int32_t moe_type_block(moe_type type);
// Bytes of a row of n weights; 0 if n is not a positive multiple of the block, if the type is
// unknown or if the size does not fit.
MOE_API size_t moe_type_row_size(moe_type type, int64_t n);
// rows: n_rows * moe_type_row_size(type, n) bytes, any alignment; out: n_rows * n floats. Types
// with interleaved rows (_R4, _R8) come in whole groups of 4 or 8. Errors: ARGUMENT (NULL,
// negative or ragged size), UNSUPPORTED.
MOE_API moe_status moe_type_dequantize(moe_type type, const void *rows, float *out, int64_t n_rows,
                                       int64_t n, moe_error *error);
// The reverse. importance: NULL or n non-negative weights of the squared error per column (an
// importance matrix's mean squared activations). Deterministic. NaN and infinity in `in`: the
// block's result is unspecified but well-formed. UNSUPPORTED for types that can only be read.
MOE_API moe_status moe_type_quantize(moe_type type, const float *in, void *rows, int64_t n_rows,
                                     int64_t n, const float *importance, moe_error *error);

// Instruction set of the kernels. One that the machine (or the build) lacks falls back to the
// next lower one.
typedef enum moe_isa {
    MOE_ISA_BEST = 0,
    MOE_ISA_SCALAR = 1,
    MOE_ISA_AVX2 = 2,    // AVX2, FMA, F16C
    MOE_ISA_AVX512 = 3,  // AVX-512 F, BW, VL, DQ, VNNI
    MOE_ISA_AVX_VNNI = 4 // AVX2 and AVX-VNNI (256 bit): between AVX2 and AVX512
} moe_isa;

// What `isa` resolves to on this machine: any of them but BEST.
MOE_API moe_isa moe_isa_resolve(moe_isa isa);
MOE_API const char *moe_isa_name(moe_isa isa);

// ---- GGUF files ------------------------------------------------------------------------------

// How a file's bytes lie in memory. Mapped pages are shared with other processes, and opening
// takes milliseconds; how fast they are read depends on the pages in which the system caches the
// file, on some virtual machines by a multiple. A copy is private, in huge pages (2 MiB) if the
// system has them, and the cache behind it is dropped, so that memory is needed once.
typedef enum moe_pages {
    MOE_PAGES_AUTO = 0, // mapped, and the file stays open; a model measures a sample of what is
                        // cached and, only if that is read much slower than huge pages are,
                        // makes huge pages of it
    MOE_PAGES_MAP = 1,  // mapped, never copied
    MOE_PAGES_COPY = 2  // copied: a file that is cut short later cannot hurt any more
} moe_pages;

typedef struct moe_gguf moe_gguf;

typedef struct moe_gguf_options {
    moe_allocator allocator; // of tables; files are mapped or copied into pages of the system
    moe_pages pages;   // AUTO does what MAP does until a model is opened
    int32_t prefault;  // MOE_ON: touch every page before returning
    // Called now and then while reading or touching pages, by the thread that opens; fraction in
    // 0..1. Return 0 to cancel.
    int (*progress)(void *user, float fraction);
    void *progress_user;
} moe_gguf_options;

// Bytes that need not end in NUL.
typedef struct moe_string {
    const char *data;
    size_t size;
} moe_string;

// GGUF metadata value types, as in the file.
typedef enum moe_value_type {
    MOE_VALUE_UINT8,
    MOE_VALUE_INT8,
    MOE_VALUE_UINT16,
    MOE_VALUE_INT16,
    MOE_VALUE_UINT32,
    MOE_VALUE_INT32,
    MOE_VALUE_FLOAT32,
    MOE_VALUE_BOOL,
    MOE_VALUE_STRING,
    MOE_VALUE_ARRAY,
    MOE_VALUE_UINT64,
    MOE_VALUE_INT64,
    MOE_VALUE_FLOAT64
} moe_value_type;

typedef struct moe_gguf_value {
    moe_string key;
    moe_value_type type;         // MOE_VALUE_ARRAY: see the next two
    moe_value_type element_type; // of an array; = type otherwise
    uint64_t count;              // elements of an array; 1 otherwise
    uint64_t offset;             // of the value's first byte in the file
    uint64_t size;               // bytes at data; of an array: all its elements
    const void *data;            // as in the file: little-endian, unaligned
} moe_gguf_value;

typedef struct moe_gguf_tensor {
    char name[64];
    moe_type type;   // may be a type that the library does not support or know
    int32_t n_dims;  // 1..4
    int64_t ne[4];   // each >= 1; ne[0] = row length
    uint64_t offset; // from the start of its file
    uint64_t size;   // bytes; 0 if the type is unknown
    int32_t part;    // which file of a split model, from 0
    const void *data; // the weights, where they lie in the mapping; NULL if the type is unknown
} moe_gguf_tensor;

// Opens a file, or the first file of a split model (NAME-00001-of-0000N.gguf: all parts are
// opened). Every size in the file is checked before it is used. Errors: ARGUMENT, MEMORY, IO,
// FORMAT (with offset and key or tensor name), UNSUPPORTED (GGUF version, byte order),
// CANCELLED.
MOE_API moe_gguf *moe_gguf_open(const char *path, const moe_gguf_options *options,
                                moe_error *error);
// A whole unsplit GGUF file in memory, which must stay unchanged until close. options->pages
// etc. do not matter.
MOE_API moe_gguf *moe_gguf_open_memory(const void *data, size_t size,
                                       const moe_gguf_options *options, moe_error *error);
MOE_API void moe_gguf_close(moe_gguf *gguf);

MOE_API uint32_t moe_gguf_version(const moe_gguf *gguf);
MOE_API uint64_t moe_gguf_file_size(const moe_gguf *gguf); // bytes of all parts together
MOE_API int64_t moe_gguf_n_values(const moe_gguf *gguf);   // metadata, of the first part
MOE_API int64_t moe_gguf_n_tensors(const moe_gguf *gguf);  // of all parts
// Entries by index in file order, NULL if out of range.
MOE_API const moe_gguf_value *moe_gguf_value_at(const moe_gguf *gguf, int64_t i);
MOE_API const moe_gguf_tensor *moe_gguf_tensor_at(const moe_gguf *gguf, int64_t i);
// Entries by name, NULL if there is none.
MOE_API const moe_gguf_value *moe_gguf_find_value(const moe_gguf *gguf, const char *key);
MOE_API const moe_gguf_tensor *moe_gguf_find_tensor(const moe_gguf *gguf, const char *name);

// Element i of a value (0 for a scalar), converted. Return 1, or 0 if value is NULL, i is out of
// range, or the element is not of that kind: integers of any width (and bool) for _int, f32 or
// f64 (and integers) for _float, bool or the integers 0 and 1 for _bool. Integers above
// INT64_MAX are not representable. So a value is read, or x keeps its default:
//     int64_t x = 32;
//     moe_gguf_value_int(moe_gguf_find_value(gguf, "general.alignment"), 0, &x);
MOE_API int moe_gguf_value_int(const moe_gguf_value *value, uint64_t i, int64_t *out);
MOE_API int moe_gguf_value_float(const moe_gguf_value *value, uint64_t i, double *out);
MOE_API int moe_gguf_value_bool(const moe_gguf_value *value, uint64_t i, int *out);
// A string value, or the strings of an array one after another: *cursor starts as NULL and is
// moved on. Returns 0 behind the last and for values of other types, NULL among them.
MOE_API int moe_gguf_value_string(const moe_gguf_value *value, const void **cursor,
                                  moe_string *out);

// ---- models ----------------------------------------------------------------------------------

typedef struct moe_model moe_model; // immutable: share it between sessions and threads
typedef struct moe_vocab moe_vocab;

// On which memory nodes the pages of weights lie. Other than OFF, all are touched at opening, as
// prefault does. Pages of a mapped file that other processes use stay where they are. With more
// than one node a copy is made of small pages, since 2 MiB often hold rows of two nodes.
typedef enum moe_numa {
    MOE_NUMA_OFF = 0,        // where the system puts them
    MOE_NUMA_INTERLEAVE = 1, // in turn on all nodes: for any threads; on two nodes half is far
    MOE_NUMA_OWNER = 2       // rows on the node of the pinned threads that read them
} moe_numa;

typedef struct moe_model_options {
    moe_allocator allocator;
    moe_pages pages;
    int32_t prefault;  // as in moe_gguf_options
    int32_t mlock;     // MOE_ON: keep the weights in memory, as far as the system allows
    moe_numa numa;
    int (*progress)(void *user, float fraction); // as in moe_gguf_options
    void *progress_user;
} moe_model_options;

// Hyper-parameters, read from the file and checked against the tensors.
typedef struct moe_model_info {
    char family[32];          // general.architecture
    char name[64];            // general.name, may be empty
    int32_t n_vocab;          // rows of token_embd and output: the length of a row of logits
    int32_t n_ctx_train;      // context_length
    int32_t n_layer;          // layers that are run
    int32_t n_embd;
    int32_t n_head, n_head_kv; // of the first layer
    int32_t n_expert, n_expert_used, n_expert_shared;
    int32_t n_ff, n_ff_exp;   // width of the first layer if it is dense, of a routed expert
    int64_t n_params;         // weights of all tensors in use
    int64_t n_bytes;          // their bytes in the file
    int64_t n_bytes_token;    // bytes of weights that generating one token reads
    int64_t n_bytes_made;     // bytes of matrices made at opening: transposed keys' halves of
                              // attn_kv_b in files without attn_k_b
} moe_model_info;

// What became of the wishes about memory; where the system refuses one, nothing else changes.
typedef struct moe_model_memory {
    moe_pages pages;         // MAP, or COPY if the file was copied, if only in part
    uint64_t n_bytes_copied; // of the file: memory that no other process shares
    double map_rate;         // bytes per second at which a sample of the mapping was read, and
    double copy_rate;        // as much anonymous memory in huge pages; 0: not measured
    char text[160];          // what was done and why, in words: "4.00 GiB copied to huge pages:
                             // the mapping reads at 7.1 of 41.3 GB/s"
    moe_numa numa;           // OFF if there is one node only, or if the system refused
    int32_t n_nodes;         // memory nodes with processors that we may use; 1 if numa was OFF
    uint64_t n_bytes_placed; // of weights, in the right place: OWNER: on their node; INTERLEAVE:
                             // as many times the least loaded node as there are nodes
    uint64_t n_bytes_locked; // of weights, by mlock
} moe_model_memory;

// Opens path (as moe_gguf_open) and prepares it for running. options may be NULL. Refused with the
// reason: a family, tensor type or tokenizer that is not supported (UNSUPPORTED), a missing or
// misshapen tensor, a hyper-parameter out of bounds (FORMAT). Other errors: ARGUMENT, IO, MEMORY,
// THREAD, CANCELLED (by progress). Weights stay in the mapping; norms and the like are copied. NULL
// after an error; close the model when its sessions are closed.
MOE_API moe_model *moe_model_open(const char *path, const moe_model_options *options,
                                  moe_error *error);
// The same from a GGUF opened before (from memory, for instance), which must outlive the model.
// What options->pages says counts only if the GGUF was opened with AUTO, and only for its first
// model; prefault does not matter.
MOE_API moe_model *moe_model_open_gguf(const moe_gguf *gguf, const moe_model_options *options,
                                       moe_error *error);
MOE_API void moe_model_close(moe_model *model);
MOE_API const moe_vocab *moe_model_vocab(const moe_model *model); // NULL: token ids only
MOE_API const moe_gguf *moe_model_gguf(const moe_model *model);
MOE_API const moe_model_info *moe_model_get_info(const moe_model *model);
// With AUTO the weights may still move to huge pages while tokens are generated, if they are
// read slowly by then: ask again for what came of it (what an earlier call returned stays as it
// was until close).
MOE_API const moe_model_memory *moe_model_get_memory(const moe_model *model);

// ---- vocabulary ------------------------------------------------------------------------------

enum {
    MOE_TOKENIZE_ADD_SPECIAL = 1,  // put BOS / EOS around the text if the file says so
    MOE_TOKENIZE_PARSE_SPECIAL = 2 // recognise the text of control tokens ("<|im_end|>"); leave
};                                 // it out for text that users typed

// Reads the tokenizer of a GGUF file ("gpt2": byte-level BPE, "llama": SPM); files without
// tensors work too. The GGUF may be closed afterwards. A model has one already: moe_model_vocab;
// only what was opened here is closed here. Errors: FORMAT, MEMORY, UNSUPPORTED (an
// unknown tokenizer or pre-tokenizer).
MOE_API moe_vocab *moe_vocab_open(const moe_gguf *gguf, moe_error *error);
MOE_API void moe_vocab_close(moe_vocab *vocab);
MOE_API int32_t moe_vocab_size(const moe_vocab *vocab);
// Text to tokens. Writes at most `capacity` ids and returns how many there are, which may be more:
// then call again with that capacity (NULL and 0 only count). flags: MOE_TOKENIZE_... Any bytes
// are accepted. Returns -(int64_t)moe_status on errors: ARGUMENT (NULL, unknown flags, more than
// INT32_MAX bytes; 2^29 are always accepted), MEMORY. Time grows as n log n with the text. Up to
// 16 MiB of working memory stay with the vocabulary for the next call, until moe_vocab_close.
MOE_API int64_t moe_vocab_tokenize(const moe_vocab *vocab, const char *text, size_t text_size,
                                   unsigned flags, int32_t *tokens, size_t capacity);
// Tokens to text, one by one: the bytes of a token. A character may be spread over several tokens.
// Writes at most `capacity` bytes (no NUL) and returns how many there are, which may be more.
// Control tokens, ids out of range: 0 bytes. SPM vocabularies put a blank in front of most texts,
// which the first token gives back: drop it.
MOE_API size_t moe_vocab_text(const moe_vocab *vocab, int32_t token, char *buffer, size_t capacity);
// The token's entry in the vocabulary as text, also for control tokens ("<|im_end|>"); not
// NUL-terminated, {NULL, 0} if out of range.
MOE_API moe_string moe_vocab_token(const moe_vocab *vocab, int32_t token);
// The token whose entry is this text, or -1.
MOE_API int32_t moe_vocab_find(const moe_vocab *vocab, const char *text, size_t text_size);
MOE_API int32_t moe_vocab_bos(const moe_vocab *vocab);        // -1 if there is none
MOE_API int32_t moe_vocab_eos(const moe_vocab *vocab);        // -1 if there is none
MOE_API int moe_vocab_is_end(const moe_vocab *vocab, int32_t token); // end of generation?
MOE_API int moe_vocab_is_control(const moe_vocab *vocab, int32_t token);

// ---- thread pool -----------------------------------------------------------------------------

typedef struct moe_pool moe_pool;

typedef struct moe_pool_options {
    moe_allocator allocator;
    int32_t n_threads; // the caller's thread included; 0: physical cores in the affinity mask
                       // and cgroup quota; at most MOE_MAX_THREADS
    int32_t spin_us;   // microseconds that a waiting thread spins before it sleeps, at most;
                       // fewer while it keeps ending up asleep. MOE_OFF: none; 0: 50, or none
                       // in a job of more threads than processors
    int32_t pin;       // MOE_ON: each thread stays on a core of its own (then on second hardware
                       // threads), in blocks over the memory nodes; the caller's thread only
                       // while it evaluates. Default: the system moves threads as it likes
} moe_pool_options;

enum { MOE_MAX_THREADS = 1024 };

// Threads that sleep between evals, and the buffers for a batch. A session makes its own unless
// it is given one; sessions that share one take turns or are evaluated together, and each
// further one costs its cache only. Errors: ARGUMENT, MEMORY, THREAD.
MOE_API moe_pool *moe_pool_open(const moe_pool_options *options, moe_error *error);
MOE_API void moe_pool_close(moe_pool *pool); // after the sessions that use it
MOE_API int32_t moe_pool_threads(const moe_pool *pool);

// ---- sessions --------------------------------------------------------------------------------

typedef struct moe_session moe_session; // one context; one thread at a time

typedef enum moe_kv_type { MOE_KV_F16 = 0, MOE_KV_Q8_0 = 1, MOE_KV_F32 = 2 } moe_kv_type;

typedef enum moe_schedule {
    MOE_SCHEDULE_DEFAULT = 0,    // by the macros, see >>config
    MOE_SCHEDULE_SEQUENTIAL = 1, // all threads on one expert after another
    MOE_SCHEDULE_PARALLEL = 2,   // experts at the same time, each by some of the threads
    MOE_SCHEDULE_BALANCED = 3    // one list of (expert, row block), cut evenly
} moe_schedule;

typedef struct moe_session_options {
    int32_t n_ctx;           // tokens that fit; 0: min(context_length, 4096)
    int32_t n_batch;         // tokens evaluated at once (longer inputs are cut); 0: 512
    int32_t n_threads;       // for generation; 0: see moe_pool_options
    int32_t n_threads_batch; // for prompts (more than one token); 0: n_threads
    moe_kv_type kv_type;     // Q8_0: widths of keys and values are multiples of 32
    int32_t keep_all_logits; // MOE_ON: logits of every token of an eval, not only of the last
    moe_schedule schedule;
    moe_isa isa;
    moe_pool *pool;          // shared threads, must outlive the session; NULL: own
    int32_t pin;             // own threads: as in moe_pool_options; default: pinned if the
                             // model's weights were placed by MOE_NUMA_OWNER
    // Asked at least once per layer, non-zero cancels the eval; cannot evaluate with the pool.
    int (*should_stop)(void *user);
    void *should_stop_user;
} moe_session_options;

// What was asked for, resolved, and the memory that it takes: the same from open to close.
typedef struct moe_session_info {
    int32_t n_ctx, n_batch, n_threads, n_threads_batch;
    moe_kv_type kv_type;
    moe_schedule schedule; // what MOE_SCHEDULE_DEFAULT became
    moe_isa isa;           // what was asked for, resolved
    size_t kv_bytes;       // the cache
    size_t work_bytes;     // everything else; sessions of a pool share most of it
} moe_session_info;

// Takes all memory and threads that evaluating needs; options may be NULL. NULL after an error:
// ARGUMENT, MEMORY, THREAD, UNSUPPORTED (kv_type, schedule).
MOE_API moe_session *moe_session_open(const moe_model *model, const moe_session_options *options,
                                      moe_error *error);
MOE_API void moe_session_close(moe_session *session); // before its model
MOE_API const moe_model *moe_session_model(const moe_session *session);
MOE_API const moe_session_info *moe_session_get_info(const moe_session *session);
// Memory a session with these options would take, without taking it: info->kv_bytes and
// info->work_bytes (the threads' stacks are not counted).
MOE_API moe_status moe_session_estimate(const moe_model *model, const moe_session_options *options,
                                        moe_session_info *info, moe_error *error);
// Appends n_tokens ids, 0 <= id < n_vocab, to the context and computes what follows them, n_batch
// at a time. Returns when that is done; no memory is allocated. Errors leave the session as it was:
// ARGUMENT (id out of range, n_tokens < 1), CONTEXT_FULL, CANCELLED.
MOE_API moe_status moe_session_eval(moe_session *session, const int32_t *tokens, int32_t n_tokens,
                                    moe_error *error);
// Appends to several contexts at once: each matrix is read once for all of them, and each result
// has the bits that it has alone. The sessions have one model, one pool and one isa; schedule,
// n_batch and threads are those of the first, and its statistics tell about the call.
// A job that is wrong is left out, its status says why; the others are evaluated. Returns the
// first status that is not MOE_OK. If any session's should_stop says so, all are CANCELLED.
typedef struct moe_job {
    moe_session *session;
    const int32_t *tokens;
    int32_t n_tokens;
    moe_status status; // out: as of moe_session_eval
} moe_job;
MOE_API moe_status moe_session_eval_many(moe_job *jobs, int32_t n_jobs, moe_error *error);
// n_vocab floats, not normalized: how likely each token is to follow the i-th token of the last
// eval (-1: the last one). NULL if not kept: of other than the last token, without
// keep_all_logits; before the first eval. Valid until the session is evaluated again, rewound or
// closed; a failed or cancelled eval leaves them.
MOE_API const float *moe_session_logits(const moe_session *session, int32_t i);
// Tokens in the context: the position of the next one.
MOE_API int32_t moe_session_length(const moe_session *session);
// Forgets all tokens from position `length` on, 0 <= length <= moe_session_length, and the logits
// if any token is forgotten. Costs nothing; what comes next has the bits it would have had. Errors:
// ARGUMENT (also from should_stop of an eval of this session).
MOE_API moe_status moe_session_rewind(moe_session *session, int32_t length, moe_error *error);

// ---- sampling and generating -----------------------------------------------------------------

typedef struct moe_sampler moe_sampler;

typedef struct moe_sampler_options {
    moe_allocator allocator;
    float temperature;    // <= 0: greedy (the largest logit, the lowest id among equals)
    int32_t top_k;        // keep the k most likely; <= 0: all
    float top_p;          // keep the fewest whose probabilities reach p; 0 or >= 1: all
    float min_p;          // drop those below min_p times the most likely; 0: none
    float repeat_penalty; // divides positive and multiplies negative logits of recent tokens;
                          // 0 or 1: off
    int32_t repeat_last_n; // how many tokens count as recent; 0: 64; MOE_OFF: none
    uint64_t seed;        // same seed, same logits: same tokens
} moe_sampler_options;

// Order: repetition penalty, top-k, top-p, min-p, temperature (llama.cpp's order).
// n_vocab: length of the rows of logits, moe_model_info.n_vocab; ids from n_valid on are never
// chosen: moe_vocab_size, where a model's rows are padded, else n_vocab.
// Errors: MEMORY, ARGUMENT (an option is NaN, infinite or, but for temperature, negative).
MOE_API moe_sampler *moe_sampler_open(const moe_sampler_options *options, int32_t n_vocab,
                                      int32_t n_valid, moe_error *error);
MOE_API void moe_sampler_close(moe_sampler *sampler);
// Chooses a token by n_vocab logits. NaN counts as minus infinity; if nothing is finite, token 0 is
// returned.
MOE_API int32_t moe_sampler_sample(moe_sampler *sampler, const float *logits);
// Tells the sampler what was evaluated (prompt and choices), for the repetition penalty;
// moe_generate does so itself.
MOE_API void moe_sampler_accept(moe_sampler *sampler, int32_t token);

typedef enum moe_stop_reason {
    MOE_STOP_LIMIT,   // max_tokens reached
    MOE_STOP_END,     // the model ended
    MOE_STOP_STRING,  // a stop string appeared (it is not part of the text)
    MOE_STOP_CALLER,  // on_text returned 0 or the session's should_stop said so
    MOE_STOP_CONTEXT  // the context is full
} moe_stop_reason;

// "the model ended" etc.; never NULL.
MOE_API const char *moe_stop_reason_text(moe_stop_reason reason);

typedef struct moe_generate_options {
    int32_t max_tokens;      // <= 0: until the context is full
    moe_sampler *sampler;    // NULL: greedy
    const char *const *stop; // n_stop strings of 1 to 512 bytes of UTF-8, NUL-terminated
    size_t n_stop;
    int32_t ignore_end;      // MOE_ON: go on after end-of-generation tokens
    int32_t special;         // MOE_ON: control tokens appear as text
    // Gets the text bit by bit: whole characters of valid UTF-8, as soon as no stop string can
    // begin in them (bytes that are not UTF-8 become U+FFFD); not NUL-terminated, valid until it
    // returns. Called by the thread that called moe_generate. Return 0 to stop. May be NULL.
    int (*on_text)(void *user, const char *text, size_t size);
    void *user;
} moe_generate_options;

typedef struct moe_generate_result {
    moe_stop_reason reason;
    int32_t n_prompt;    // tokens of the prompt, evaluated
    int32_t n_generated; // tokens chosen and reported through on_text
    int32_t next_token;  // chosen last and not evaluated: to go on, begin the next prompt with
                         // it. It is reported unless the reason is END. -1: there is none
    double prompt_seconds, generate_seconds;
} moe_generate_result;

// Evaluates the prompt behind what the session holds, then chooses, reports and evaluates tokens
// until something stops it. The last one is not evaluated, so that a full context gives one
// token more than fits. The model must have a vocabulary. Memory: nothing is allocated. An empty
// prompt goes on with the logits of the last eval. *result (may be NULL) is always set; after an
// error its reason is CALLER, or CONTEXT for a prompt that does not fit. Errors: those of
// moe_session_eval for the prompt; ARGUMENT; FORMAT (no logit is a number).
MOE_API moe_status moe_generate(moe_session *session, const int32_t *prompt, int32_t n_prompt,
                                const moe_generate_options *options, moe_generate_result *result,
                                moe_error *error);
// The same with a text, NUL-terminated: it begins with BOS if the session is empty and the file
// says so. Control tokens in it are mere text; to have them recognised, as chat templates need
// it, see moe_vocab_tokenize. Allocates the tokens, which do not outlive the call. Errors: also
// MEMORY.
MOE_API moe_status moe_generate_text(moe_session *session, const char *text,
                                     const moe_generate_options *options,
                                     moe_generate_result *result, moe_error *error);

// ---- statistics ------------------------------------------------------------------------------

// For benchmarks and for finding out why something is slow: nothing here is needed to run a model.

// Of the last eval of a session (of the first session of moe_session_eval_many).
typedef struct moe_session_stats {
    double eval_seconds;      // how long it took
    double wait_seconds;      // what its threads together waited for each other
    const double *thread_wait_seconds; // [n_threads], 0: the caller's. A thread that always waits
                              // least has more work than the others, or a slower core
    int32_t n_threads;        // that took part, pinned to
    int32_t n_nodes;          // so many memory nodes; 1: not pinned
    int32_t n_expert_groups;  // of threads on experts at the same time in the last layer of
                              // experts: more than 1 with MOE_SCHEDULE_PARALLEL, if it can
    uint64_t n_barriers;      // that its threads passed
} moe_session_stats;

// NULL if session is. All 0 before the first eval; the next eval writes over it.
MOE_API const moe_session_stats *moe_session_get_stats(const moe_session *session);
// n_expert counts: for how many tokens each routed expert of a layer was chosen since the
// session was opened (tokens that were forgotten later, too). NULL: the layer has no experts, or
// is out of range. Valid until close.
MOE_API const uint64_t *moe_session_expert_counts(const moe_session *session, int32_t layer);
// Bytes of the session's cache and buffers, and of the model's files, that are on huge pages now,
// as /proc/self/smaps tells: pages of a mapping count once they were read. Takes milliseconds.
MOE_API uint64_t moe_session_huge_bytes(const moe_session *session);
MOE_API uint64_t moe_model_huge_bytes(const moe_model *model);

#ifdef __cplusplus
}
#endif

// Stop here if you only use the library.

#endif // MOE_INFER_H

// Where the implementation cannot work one sentence is worth more than what follows from it.
#if defined(MOE_INFER_IMPLEMENTATION) && !defined(MOE__IMPLEMENTED)
#if defined(_WIN32)
#error "moe_infer.h needs a POSIX system: compile its implementation for Linux or WSL"
#elif !defined(__GNUC__) || defined(__TINYC__)
#error "moe_infer.h needs GCC or clang to compile its implementation"
#elif !defined(__cplusplus) && (!defined(__STDC_VERSION__) || __STDC_VERSION__ < 199901L)
#error "moe_infer.h needs C99 or later to compile its implementation: -std=gnu11, for instance"
#elif __SIZEOF_POINTER__ != 8
#error "moe_infer.h maps models larger than 4 GiB: it needs a 64-bit system"
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "moe_infer.h needs infinities and NaN: compile its implementation without -ffast-math"
#elif defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "moe_infer.h reads little-endian files in place and needs a little-endian machine"
#else
#define MOE__IMPLEMENT
#endif
#endif

#if defined(MOE__IMPLEMENT) && !defined(MOE__IMPLEMENTED)

// ==============================================================================================
// >>base
//
// What every room below uses, one of each: the UTF-8 decoder, errors, memory, checked sizes, small
// floats, random numbers, binary heaps. Nothing here knows about models.
// ==============================================================================================

#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__) && MOE__USE_AVX2
#define MOE__X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define MOE__X86 0
#endif

// Down to the end of the implementation no product is fused with what is added to it (fmaf is
// written where it shall be), so that a processor with fused multiply-adds, as every aarch64 is,
// computes the same bits as one without. clang's -ffp-contract=fast overrules such pragmas.
#if defined(__clang__)
#if defined(__x86_64__)
#pragma float_control(push)
#endif
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

#define MOE__PRIVATE static __attribute__((unused))
#define MOE__INLINE static inline __attribute__((unused, always_inline))
#define MOE__ALIGNED(n) __attribute__((aligned(n)))
#define MOE__PRINTF(text, first) __attribute__((__format__(__printf__, text, first)))
#define MOE__STATIC_ASSERT(name, condition) \
    typedef char moe__assert_##name[(condition) ? 1 : -1] __attribute__((unused))

// Under strict -std=c11 glibc hides syscall(); its prototype is older than the standard.
#if !defined(__cplusplus) && defined(__GLIBC__) && !defined(__USE_MISC)
extern long syscall(long number, ...);
#endif

#ifdef O_CLOEXEC
#define MOE__O_CLOEXEC O_CLOEXEC
#elif defined(__linux__)
#define MOE__O_CLOEXEC 02000000
#else
#define MOE__O_CLOEXEC 0
#endif

// ---- UTF-8 -----------------------------------------------------------------------------------

enum { MOE__UTF8_BAD = 0, MOE__UTF8_CUT = -1 };

// Reads the character at the start of 1 or more bytes. Returns its size, 1 to 4. MOE__UTF8_BAD:
// no character begins so (overlong forms, surrogates and codes above U+10FFFF are none).
// MOE__UTF8_CUT: all bytes are the beginning of one that goes on behind them.
MOE__PRIVATE int moe__utf8_decode(const char *text, size_t size, uint32_t *code) {
    const unsigned char *p = (const unsigned char *)text;
    const unsigned lead = *code = p[0];
    if (lead < 0x80) return 1;
    const int n = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    // What may follow depends on the lead: table 3-7 of the Unicode standard
    unsigned low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (lead < 0xC2 || lead > 0xF4) return MOE__UTF8_BAD;
    *code = lead & (0x7Fu >> n);
    for (int i = 1; i < n; i++, low = 0x80, high = 0xBF) {
        if ((size_t)i == size) return MOE__UTF8_CUT;
        if (p[i] < low || p[i] > high) return MOE__UTF8_BAD;
        *code = *code << 6 | (p[i] & 0x3F);
    }
    return n;
}

// The same for any bytes: one that begins no character counts as one of its own, U+FFFD.
MOE__INLINE size_t moe__utf8_next(const char *text, size_t size, uint32_t *code) {
    const int n = moe__utf8_decode(text, size, code);
    if (n > 0) return (size_t)n;
    *code = 0xFFFD;
    return 1;
}

// At most `limit` bytes of a text, whole characters.
MOE__PRIVATE size_t moe__utf8_limit(const char *text, size_t size, size_t limit) {
    if (size <= limit) return size;
    while (limit && ((unsigned char)text[limit] & 0xC0) == 0x80) limit--;
    return limit;
}

// ---- errors ----------------------------------------------------------------------------------

MOE_API const char *moe_status_name(moe_status status) {
    switch (status) {
    case MOE_OK: return "MOE_OK";
    case MOE_ERROR_ARGUMENT: return "MOE_ERROR_ARGUMENT";
    case MOE_ERROR_MEMORY: return "MOE_ERROR_MEMORY";
    case MOE_ERROR_IO: return "MOE_ERROR_IO";
    case MOE_ERROR_FORMAT: return "MOE_ERROR_FORMAT";
    case MOE_ERROR_UNSUPPORTED: return "MOE_ERROR_UNSUPPORTED";
    case MOE_ERROR_CONTEXT_FULL: return "MOE_ERROR_CONTEXT_FULL";
    case MOE_ERROR_CANCELLED: return "MOE_ERROR_CANCELLED";
    case MOE_ERROR_THREAD: return "MOE_ERROR_THREAD";
    }
    return "MOE_ERROR_?";
}

// Copies at most capacity - 1 bytes, whole characters, and ends with NUL.
MOE__PRIVATE void moe__base_copy_text(char *out, size_t capacity, const char *text, size_t size) {
    size = moe__utf8_limit(text, size, capacity - 1);
    if (size) memcpy(out, text, size);
    out[size] = 0;
}

// The same, with a '?' for every byte that is not UTF-8, or that a terminal might obey (below
// space, DEL, U+0080 to U+009F): errors quote files.
MOE__PRIVATE void moe__base_copy_shown(char *out, size_t capacity, const char *text, size_t size) {
    size_t used = 0;
    for (size_t i = 0; i < size;) {
        uint32_t code;
        const int n = moe__utf8_decode(text + i, size - i, &code);
        const int shown = n > 0 && code >= 0x20 && (code < 0x7F || code > 0x9F);
        const size_t step = shown ? (size_t)n : 1;
        if (used + step > capacity - 1) break;
        if (shown) memcpy(out + used, text + i, step);
        else out[used] = '?';
        used += step;
        i += step;
    }
    out[used] = 0;
}

// Fills *error (if any) and returns `status`: `return moe__fail(error, ...)`. `where` is size
// bytes.
MOE__PRIVATE MOE__PRINTF(6, 7) moe_status
    moe__fail_at(moe_error *error, moe_status status, uint64_t offset, const char *where,
                 size_t where_size, const char *format, ...) {
    if (error) {
        char text[512]; // longer than error->text, so that a cut can mind UTF-8
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        error->status = status;
        error->offset = offset;
        moe__base_copy_shown(error->where, sizeof error->where, where ? where : "",
                             where ? where_size : 0);
        moe__base_copy_shown(error->text, sizeof error->text, text, strlen(text));
    }
    return status;
}
#define moe__fail(error, status, where, ...) \
    moe__fail_at(error, status, 0, where, strlen(where), __VA_ARGS__)

// For what loads something and has the fields status and error: the first error stays, and one
// look at the status behind several steps is enough.
#define moe__load_fail_at(loader, code, offset, where, ...) \
    ((loader)->status = (loader)->status \
                            ? (loader)->status \
                            : moe__fail_at((loader)->error, code, offset, where, strlen(where), \
                                           __VA_ARGS__))
#define moe__load_fail(loader, code, where, ...) \
    moe__load_fail_at(loader, code, 0, where, __VA_ARGS__)

MOE__INLINE int moe__is_switch(int32_t value) { return value >= MOE_OFF && value <= MOE_ON; }

// What an errno means for a file; NULL: only its number is known. strerror would depend on the
// program's language and is not safe among threads.
MOE__PRIVATE const char *moe__errno_words(int code) {
    switch (code) {
    case ENOENT: return "there is no such file";
    case EACCES: return "permission denied";
    case EPERM: return "not permitted";
    case ENOTDIR: return "a folder in the path is none";
    case EISDIR: return "it is a directory";
    case ELOOP: return "too many symbolic links in the path, or a loop of them";
    case EMFILE:
    case ENFILE: return "too many files are open";
    case ENOMEM: return "not enough memory";
    case ENAMETOOLONG: return "the name is too long";
    case EIO: return "input/output error";
    case EINTR: return "interrupted by a signal";
    case EAGAIN: return "the resource is busy or a limit is reached";
    case EBUSY: return "the file or device is busy";
    case ETXTBSY: return "the file is a program that is running";
    case EEXIST: return "the file is there already";
    case EROFS: return "the file system is read-only";
    case ENOSPC: return "no space is left on the device";
    case EFBIG:
    case EOVERFLOW: return "the file is too large";
    case ENODEV:
    case ENXIO: return "there is no such device";
    case EINVAL: return "invalid argument";
    case EBADF: return "the file is not open for this";
    case EPIPE: return "nobody reads the pipe";
#ifdef EDQUOT
    case EDQUOT: return "the quota of the disk is used up";
#endif
#ifdef ESTALE
    case ESTALE: return "the file has gone from its server";
#endif
    case ETIMEDOUT: return "the file system did not answer in time";
    default: return NULL;
    }
}

// ---- memory ----------------------------------------------------------------------------------

MOE__PRIVATE void *moe__base_malloc(void *user, size_t size) {
    (void)user;
    return malloc(size);
}
MOE__PRIVATE void moe__base_free(void *user, void *memory, size_t size) {
    (void)user;
    (void)size;
    free(memory);
}

// The caller's allocator, or malloc and free; one half alone is an error of the caller.
MOE__PRIVATE moe_status moe__allocator_init(moe_allocator *out, const moe_allocator *wanted,
                                            moe_error *error) {
    if (wanted && (wanted->alloc || wanted->free)) {
        if (!wanted->alloc || !wanted->free)
            return moe__fail(error, MOE_ERROR_ARGUMENT, "allocator",
                             "allocator needs both alloc and free, or neither");
        *out = *wanted;
        return MOE_OK;
    }
    out->alloc = moe__base_malloc;
    out->free = moe__base_free;
    out->user = NULL;
    return MOE_OK;
}

// Memory aligned to 64 bytes whatever the allocator gives. NULL if size is 0 or too large. The
// allocator's own pointer and size lie in the 16 bytes before it.
MOE__PRIVATE void *moe__alloc_unset(const moe_allocator *allocator, size_t size) {
    if (size == 0 || size > SIZE_MAX / 2) return NULL;
    size_t total = size + 64 + 16;
    unsigned char *raw = (unsigned char *)allocator->alloc(allocator->user, total);
    if (!raw) return NULL;
    unsigned char *memory = (unsigned char *)(((uintptr_t)raw + 16 + 63) & ~(uintptr_t)63);
    memcpy(memory - 16, &raw, sizeof raw);
    memcpy(memory - 8, &total, sizeof total);
    return memory;
}
// The same, zeroed.
MOE__PRIVATE void *moe__alloc(const moe_allocator *allocator, size_t size) {
    void *memory = moe__alloc_unset(allocator, size);
    if (memory) memset(memory, 0, size);
    return memory;
}
MOE__PRIVATE void moe__free(const moe_allocator *allocator, void *memory) {
    if (!memory) return;
    unsigned char *raw;
    size_t total;
    memcpy(&raw, (unsigned char *)memory - 16, sizeof raw);
    memcpy(&total, (unsigned char *)memory - 8, sizeof total);
    allocator->free(allocator->user, raw, total);
}

// count elements, not cleared; NULL also if their size does not fit.
MOE__PRIVATE void *moe__alloc_array(const moe_allocator *allocator, uint64_t count, size_t size) {
    return count > SIZE_MAX / size ? NULL : moe__alloc_unset(allocator, (size_t)count * size);
}

// ---- checked sizes: 0 on overflow, 1 if *out is good -----------------------------------------

MOE__INLINE int moe__size_mul(uint64_t a, uint64_t b, uint64_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}
MOE__INLINE int moe__size_add(uint64_t a, uint64_t b, uint64_t *out) {
    return !__builtin_add_overflow(a, b, out);
}

// A layout of many buffers in one allocation: call moe__arena_take for each, once with base =
// NULL to learn the size, then again with the memory. Offsets are multiples of 64.
typedef struct moe__arena {
    unsigned char *base;
    uint64_t used;
    int overflow;
} moe__arena;

MOE__PRIVATE void *moe__arena_take(moe__arena *arena, uint64_t count, uint64_t size) {
    uint64_t bytes, end;
    if (!moe__size_mul(count, size, &bytes) || !moe__size_add(arena->used, bytes, &end) ||
        end > SIZE_MAX / 4) {
        arena->overflow = 1;
        return NULL;
    }
    void *memory = arena->base ? arena->base + arena->used : NULL;
    arena->used = (end + 63) & ~(uint64_t)63;
    return memory;
}

// ---- numbers ---------------------------------------------------------------------------------

MOE__INLINE uint16_t moe__load_u16(const void *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
MOE__INLINE uint32_t moe__load_u32(const void *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
MOE__INLINE uint64_t moe__load_u64(const void *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
MOE__INLINE float moe__load_f32(const void *p) {
    float v;
    memcpy(&v, p, sizeof v);
    return v;
}
MOE__INLINE void moe__store_u16(void *p, uint16_t v) { memcpy(p, &v, sizeof v); }

MOE__INLINE uint32_t moe__f32_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
MOE__INLINE float moe__f32_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// IEEE half to single, exact; NaN stays NaN.
MOE__INLINE float moe__f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
    if (rest >= 0x7C00) return moe__f32_from_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest >= 0x0400) return moe__f32_from_bits(sign | ((rest << 13) + 0x38000000));
    float magnitude = (float)rest * (1.0f / 16777216.0f); // subnormal: units of 2^-24
    return moe__f32_from_bits(sign | moe__f32_bits(magnitude));
}

// Single to half, rounding to nearest even; overflow to infinity, NaN to a quiet NaN.
MOE__INLINE uint16_t moe__f32_to_f16(float x) {
    uint32_t bits = moe__f32_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (rest >> 13 & 0x3FF));
    if (rest >= 0x477FF000) return (uint16_t)(sign | 0x7C00); // rounds to 65536 or more
    if (rest < 0x38800000) {
        // Below 2^-14: adding 0.5 leaves the value in units of 2^-24 in the low mantissa bits.
        float shifted = moe__f32_from_bits(rest) + 0.5f;
        return (uint16_t)(sign | (moe__f32_bits(shifted) - 0x3F000000));
    }
    rest += 0x0FFF + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - 0x38000000) >> 13);
}

MOE__INLINE float moe__bf16_to_f32(uint16_t b) { return moe__f32_from_bits((uint32_t)b << 16); }

// Rounds to nearest even; NaN stays NaN.
MOE__INLINE uint16_t moe__f32_to_bf16(float x) {
    uint32_t bits = moe__f32_bits(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

MOE__INLINE int64_t moe__min(int64_t a, int64_t b) { return a < b ? a : b; }
MOE__INLINE int64_t moe__max(int64_t a, int64_t b) { return a > b ? a : b; }

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators): the next
// number behind a seed, which may be any.
MOE__INLINE uint64_t moe__splitmix64(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// Seconds of a monotonic clock; clock_gettime is hidden under strict -std=c11, its call is not.
MOE__PRIVATE double moe__seconds(void) {
    struct timespec now;
    memset(&now, 0, sizeof now);
#if defined(__linux__)
    syscall(SYS_clock_gettime, 1 /* CLOCK_MONOTONIC */, &now);
#else
    timespec_get(&now, TIME_UTC);
#endif
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// ---- binary heaps ----------------------------------------------------------------------------

// The functions of a heap: n elements of a type in an array, of which i is not below any of
// 2 i + 1 and 2 i + 2. So 0, the root, is not below any other: above(a, b) is the order. Adding
// one, taking the root out and putting another in its place take log n steps, whatever comes.
#define MOE__HEAP(name, type, above) \
    /* Restores the order where only heap[root] may lie too high. */ \
    MOE__PRIVATE void name##_sift(type *heap, size_t root, size_t n) { \
        const type moved = heap[root]; \
        for (size_t child; (child = 2 * root + 1) < n; root = child) { \
            if (child + 1 < n && above(heap[child + 1], heap[child])) child++; \
            if (!above(heap[child], moved)) break; \
            heap[root] = heap[child]; \
        } \
        heap[root] = moved; \
    } \
    MOE__PRIVATE void name##_build(type *heap, size_t n) { \
        for (size_t i = n / 2; i-- > 0;) name##_sift(heap, i, n); \
    } \
    MOE__PRIVATE void name##_push(type *heap, size_t *n, type added) { \
        size_t i = (*n)++; \
        for (; i && above(added, heap[(i - 1) / 2]); i = (i - 1) / 2) \
            heap[i] = heap[(i - 1) / 2]; \
        heap[i] = added; \
    } \
    MOE__PRIVATE type name##_pop(type *heap, size_t *n) { \
        const type root = heap[0]; \
        heap[0] = heap[--*n]; \
        name##_sift(heap, 0, *n); \
        return root; \
    } \
    /* Sorts what is a heap: the root becomes the last. */ \
    MOE__PRIVATE void name##_sort(type *heap, size_t n) { \
        while (n > 1) { \
            const type root = name##_pop(heap, &n); \
            heap[n] = root; \
        } \
    }

// ---- rounding --------------------------------------------------------------------------------

// x, rounded before it is used: a product is not fused with what is added to it.
#if defined(__x86_64__)
#define MOE__ROUND(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define MOE__ROUND(x) __asm__("" : "+w"(x))
#else
#define MOE__ROUND(x) __asm__("" : "+m"(x))
#endif
MOE__INLINE float moe__rounded_f32(float x) {
    MOE__ROUND(x);
    return x;
}
MOE__INLINE double moe__rounded_f64(double x) {
    MOE__ROUND(x);
    return x;
}
#undef MOE__ROUND

// What the caller's rounding mode is, and whether it flushes small numbers to zero, must not
// reach results: whatever computes floats begins with the default environment, in every thread,
// and puts the caller's back.
MOE__INLINE void moe__floats_begin(fenv_t *callers) {
    fegetenv(callers);
    fesetenv(FE_DFL_ENV);
}
MOE__INLINE void moe__floats_end(const fenv_t *callers) { fesetenv(callers); }

// ==============================================================================================
// >>machine
//
// What the system lets this process use: processors and physical cores (affinity mask, control
// groups), the memory nodes they belong to, and the calls that bind threads and pages to them.
//
//   socket 0 = node 0    cores 0-3     threads 0 1 2 3    rows of a matrix: the first half
//   socket 1 = node 1    cores 4-7     threads 4 5 6 7                      the second half
//
// Threads stand in blocks, those of the first node first: with fixed rows per thread, a node
// reads the same rows in every token, and their pages can lie in its memory.
//
// Files are read below `root`, which is "" outside of tests. Where the system tells nothing or
// refuses, there is one node, and nothing is bound to anything.
// ==============================================================================================

enum {
    MOE__MAX_PROCESSORS = 8192, // the most that Linux is built for
    MOE__MAX_NODES = 64 // with processors that we may use; all further ones count as the last
};

typedef struct moe__machine {
    int32_t n_processors; // in the affinity mask
    int32_t n_cores;      // physical cores among them
    int32_t n_nodes;      // memory nodes that have some of them, at least 1
    int32_t node[MOE__MAX_NODES];       // the system's number of each
    int32_t cores[MOE__MAX_NODES + 1];  // cores on all nodes before
    int32_t first[MOE__MAX_NODES + 1];  // processors of node k: order[first[k]] and on, each
    uint16_t order[MOE__MAX_PROCESSORS]; // core's first hardware thread before all second ones
} moe__machine;

// Which thread of n stands where: threads first[k] .. first[k + 1] - 1 on node k.
typedef struct moe__nodes {
    int32_t n;
    int32_t first[MOE__MAX_NODES + 1];
} moe__nodes;

MOE__INLINE int moe__machine_bit(const uint64_t *mask, int i) {
    return mask[i / 64] >> (i % 64) & 1;
}

MOE__PRIVATE size_t moe__machine_page(void) {
    const long size = sysconf(_SC_PAGESIZE);
    return size > 0 ? (size_t)size : 4096;
}

// The beginning of a small text file; 0 bytes if it cannot be read.
MOE__PRIVATE size_t moe__machine_file(const char *root, const char *path, char *out,
                                      size_t capacity) {
    char whole[1024];
    size_t size = 0;
    out[0] = 0;
    if ((size_t)snprintf(whole, sizeof whole, "%s%s", root, path) >= sizeof whole) return 0;
    int fd = open(whole, O_RDONLY | MOE__O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, out, capacity - 1);
    if (n > 0) size = (size_t)n;
    close(fd);
    out[size] = 0;
    return size;
}

// A list such as "0-3,8" as bits of mask; 0 if the file cannot be read or says something else.
MOE__PRIVATE int moe__machine_list(const char *root, const char *path, uint64_t *mask) {
    char text[4096];
    memset(mask, 0, MOE__MAX_PROCESSORS / 8);
    if (!moe__machine_file(root, path, text, sizeof text)) return 0;
    for (char *p = text; *p >= '0' && *p <= '9';) {
        long low = strtol(p, &p, 10), high = *p == '-' ? strtol(p + 1, &p, 10) : low;
        for (long i = low; i <= high && i < MOE__MAX_PROCESSORS; i++)
            mask[i / 64] |= (uint64_t)1 << (i % 64);
        if (*p != ',') return *p == '\n' || !*p;
        p++;
    }
    return 0;
}

// The processors that the process may run on; returns how many.
MOE__PRIVATE int32_t moe__machine_affinity(uint64_t *mask) {
    int32_t count = 0;
    memset(mask, 0, MOE__MAX_PROCESSORS / 8);
#if defined(__linux__)
    if (syscall(SYS_sched_getaffinity, 0, (size_t)MOE__MAX_PROCESSORS / 8, mask) <= 0)
#endif
        for (long i = 0, n = sysconf(_SC_NPROCESSORS_ONLN); i < n && i < MOE__MAX_PROCESSORS; i++)
            mask[i / 64] |= (uint64_t)1 << (i % 64);
    for (int i = 0; i < MOE__MAX_PROCESSORS; i++) count += moe__machine_bit(mask, i);
    return count;
}

// Appends the node's processors: its cores first.
MOE__PRIVATE void moe__machine_add_node(moe__machine *m, const char *root, int32_t node,
                                        const uint64_t *allowed, uint64_t *on_node) {
    uint64_t siblings[MOE__MAX_PROCESSORS / 64], core[MOE__MAX_PROCESSORS / 64];
    const int32_t k = m->n_nodes;
    int32_t next = m->first[k], n_cores = 0;
    memset(core, 0, sizeof core);
    for (int cpu = 0; cpu < MOE__MAX_PROCESSORS; cpu++) {
        char path[128];
        if (!moe__machine_bit(on_node, cpu)) continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
                 cpu);
        int lowest = 0; // a core counts by the first of its hardware threads that we may use
        if (!moe__machine_list(root, path, siblings)) lowest = cpu;
        while (lowest < cpu &&
               !(moe__machine_bit(siblings, lowest) && moe__machine_bit(allowed, lowest)))
            lowest++;
        if (lowest == cpu) core[cpu / 64] |= (uint64_t)1 << (cpu % 64);
    }
    for (int second = 0; second < 2; second++)
        for (int cpu = 0; cpu < MOE__MAX_PROCESSORS; cpu++)
            if (moe__machine_bit(on_node, cpu) && moe__machine_bit(core, cpu) != second) {
                m->order[next++] = (uint16_t)cpu;
                n_cores += !second;
            }
    if (next == m->first[k]) return;
    m->node[k] = node;
    m->first[k + 1] = next;
    m->cores[k + 1] = m->cores[k] + n_cores;
    m->n_cores += n_cores;
    m->n_nodes++;
}

// What there is of the processors in `allowed`.
MOE__PRIVATE void moe__machine_read(moe__machine *m, const char *root, const uint64_t *allowed) {
    uint64_t online[MOE__MAX_PROCESSORS / 64], on_node[MOE__MAX_PROCESSORS / 64];
    uint64_t rest[MOE__MAX_PROCESSORS / 64];
    memset(m, 0, sizeof *m);
    memcpy(rest, allowed, sizeof rest);
    for (int i = 0; i < MOE__MAX_PROCESSORS; i++) m->n_processors += moe__machine_bit(allowed, i);
    moe__machine_list(root, "/sys/devices/system/node/online", online);
    for (int id = 0; id < MOE__MAX_PROCESSORS && m->n_nodes < MOE__MAX_NODES - 1; id++) {
        char path[64];
        if (!moe__machine_bit(online, id)) continue;
        snprintf(path, sizeof path, "/sys/devices/system/node/node%d/cpulist", id);
        moe__machine_list(root, path, on_node);
        for (size_t i = 0; i < sizeof rest / sizeof rest[0]; i++) {
            on_node[i] &= rest[i];
            rest[i] &= ~on_node[i];
        }
        moe__machine_add_node(m, root, id, allowed, on_node);
    }
    moe__machine_add_node(m, root, 0, allowed, rest); // those that no node lists
    if (m->n_nodes == 0) m->n_nodes = 1;
}

// What there is of the processors that this process may run on.
MOE__PRIVATE void moe__machine_this(moe__machine *m) {
    uint64_t allowed[MOE__MAX_PROCESSORS / 64];
    moe__machine_affinity(allowed);
    moe__machine_read(m, "", allowed);
}

// ---- how many threads ------------------------------------------------------------------------

// Processors for a quota of microseconds per period, rounded up; at most max.
MOE__PRIVATE int32_t moe__machine_cpus(double quota, double period, int32_t max) {
    if (!(quota > 0) || !(period > 0)) return max;
    double count = ceil(quota / period);
    return count < 1 ? 1 : count < max ? (int32_t)count : max;
}

// Calls look for the folder of each of the process's control groups that has this controller,
// from its own up to the root.
typedef void moe__machine_look_fn(const char *root, const char *path, void *found);
MOE__PRIVATE void moe__machine_groups(const char *root, const char *controller,
                                      moe__machine_look_fn *look, void *found) {
    char text[4096], path[640];
    const size_t length = strlen(controller);
    moe__machine_file(root, "/proc/self/cgroup", text, sizeof text);
    for (char *line = text, *next; *line; line = next) { // number:controllers:/path
        size_t size = strcspn(line, "\n");
        next = line + size + (line[size] != 0);
        line[size] = 0;
        char *names = strchr(line, ':'), *group = names ? strchr(names + 1, ':') : NULL;
        if (!group || strlen(group) > 512) continue;
        names++;
        *group++ = 0;
        const int v2 = !*names;
        int ours = v2;
        for (const char *p = names; *p; p += strcspn(p, ",") + (p[strcspn(p, ",")] != 0))
            ours |= strcspn(p, ",") == length && !memcmp(p, controller, length);
        if (!ours) continue;
        for (size_t n = strlen(group);; n--) {
            while (n && group[n] && group[n] != '/') n--;
            group[n] = 0;
            snprintf(path, sizeof path, "/sys/fs/cgroup%s%s%s", v2 ? "" : "/",
                     v2 ? "" : controller, group);
            look(root, path, found);
            if (!n) break;
        }
    }
    look(root, "/sys/fs/cgroup", found); // of a container without the others
}

// A file of a control group: 0 if it cannot be read.
MOE__PRIVATE size_t moe__machine_group_file(const char *root, const char *path, const char *name,
                                            char *text, size_t capacity) {
    char file[768];
    snprintf(file, sizeof file, "%s/%s", path, name);
    return moe__machine_file(root, file, text, capacity);
}

// Lowers *max (int32_t) to the processors that a control group allows: cpu.max ("200000
// 100000", "max 100000") or, in version 1, cpu.cfs_quota_us (-1: no limit) and
// cpu.cfs_period_us.
MOE__PRIVATE void moe__machine_look_cpu(const char *root, const char *path, void *max) {
    char text[128], *end;
    int32_t *count = (int32_t *)max;
    if (moe__machine_group_file(root, path, "cpu.max", text, sizeof text)) {
        double quota = strtod(text, &end);
        if (end != text) *count = moe__machine_cpus(quota, strtod(end, NULL), *count);
    }
    if (moe__machine_group_file(root, path, "cpu.cfs_quota_us", text, sizeof text)) {
        double quota = strtod(text, NULL);
        if (moe__machine_group_file(root, path, "cpu.cfs_period_us", text, sizeof text))
            *count = moe__machine_cpus(quota, strtod(text, NULL), *count);
    }
}

// Processors that the process's control groups allow, at most max.
MOE__PRIVATE int32_t moe__machine_quota(const char *root, int32_t max) {
    moe__machine_groups(root, "cpu", moe__machine_look_cpu, &max);
    return max;
}

// Physical cores in the process's affinity mask, at most the control groups' quota.
MOE__PRIVATE int32_t moe__machine_threads(const moe__machine *m, const char *root) {
    int32_t n = moe__machine_quota(root, m->n_cores);
    return n < 1 ? 1 : n > MOE_MAX_THREADS ? (int32_t)MOE_MAX_THREADS : n;
}

// ---- how much memory -------------------------------------------------------------------------

// The number behind `name` at the beginning of a line of text; 0 if there is none.
MOE__PRIVATE uint64_t moe__machine_number(const char *text, const char *name) {
    const size_t size = strlen(name);
    while (strncmp(text, name, size) || (text[size] != ' ' && text[size] != ':')) {
        text = strchr(text, '\n');
        if (!text++) return 0;
    }
    return strtoull(text + size + 1, NULL, 10);
}

// What is left of a limit in bytes; a text that is no number ("max") is none.
MOE__PRIVATE void moe__machine_left(const char *limit, uint64_t used, uint64_t *least) {
    char *end;
    const uint64_t max = strtoull(limit, &end, 10);
    const uint64_t left = max > used ? max - used : 0;
    if (end != limit && left < *least) *least = left;
}

// Lowers *least (uint64_t) to what a control group leaves. Cached files give way.
MOE__PRIVATE void moe__machine_look_memory(const char *root, const char *path, void *least) {
    static const char *const limits[] = {"memory.max", "memory.high", "memory.limit_in_bytes"};
    char text[8192], limit[64];
    uint64_t cached[2] = {0, 0}, used[2] = {0, 0};
    if (moe__machine_group_file(root, path, "memory.stat", text, sizeof text)) {
        cached[0] = moe__machine_number(text, "inactive_file") +
                    moe__machine_number(text, "active_file");
        cached[1] = moe__machine_number(text, "total_inactive_file") +
                    moe__machine_number(text, "total_active_file");
    }
    if (moe__machine_group_file(root, path, "memory.current", text, sizeof text))
        used[0] = strtoull(text, NULL, 10);
    if (moe__machine_group_file(root, path, "memory.usage_in_bytes", text, sizeof text))
        used[1] = strtoull(text, NULL, 10);
    for (int i = 0; i < 3; i++)
        if (moe__machine_group_file(root, path, limits[i], limit, sizeof limit))
            moe__machine_left(limit, used[i / 2] - moe__min((int64_t)cached[i / 2],
                                                            (int64_t)used[i / 2]),
                              (uint64_t *)least);
}

// Bytes that the process may take without anything being swapped: what the system calls
// available, its control groups leave, and its limits on address space and data allow.
MOE__PRIVATE uint64_t moe__machine_memory(const char *root) {
    static const int kinds[] = {RLIMIT_AS, RLIMIT_DATA};
    char text[4096], *p = text;
    uint64_t least = UINT64_MAX, pages[6] = {0, 0, 0, 0, 0, 0};
    if (moe__machine_file(root, "/proc/meminfo", text, sizeof text)) {
        least = moe__machine_number(text, "MemAvailable") << 10;
        if (!least) least = moe__machine_number(text, "MemFree") << 10;
    }
    moe__machine_groups(root, "memory", moe__machine_look_memory, &least);
    moe__machine_file(root, "/proc/self/statm", text, sizeof text);
    for (int i = 0; i < 6; i++) pages[i] = strtoull(p, &p, 10); // all, ..., data and stack
    for (int i = 0; i < 2; i++) {
        struct rlimit limit;
        const uint64_t used = pages[i ? 5 : 0] * moe__machine_page();
        if (getrlimit(kinds[i], &limit) || limit.rlim_cur == RLIM_INFINITY) continue;
        const uint64_t left = limit.rlim_cur > used ? (uint64_t)limit.rlim_cur - used : 0;
        if (left < least) least = left;
    }
    return least;
}

// ---- binding threads -------------------------------------------------------------------------

// n_threads in blocks, on each node in proportion to its cores.
MOE__PRIVATE void moe__machine_nodes(const moe__machine *m, int32_t n_threads, moe__nodes *nodes) {
    nodes->n = m->n_nodes;
    for (int32_t k = 0; k <= m->n_nodes; k++)
        nodes->first[k] = (int32_t)((int64_t)n_threads * m->cores[k] / moe__max(m->n_cores, 1));
    nodes->first[m->n_nodes] = n_threads;
}
MOE__PRIVATE void moe__nodes_single(moe__nodes *nodes, int32_t n_threads) {
    nodes->n = 1;
    nodes->first[0] = 0;
    nodes->first[1] = n_threads;
}
// The node that a thread stands on.
MOE__INLINE int32_t moe__nodes_of(const moe__nodes *nodes, int32_t thread) {
    int32_t k = 0;
    while (k + 1 < nodes->n && thread >= nodes->first[k + 1]) k++;
    return k;
}

// The processor of a thread: a core for each as long as there are some, then their second
// hardware threads.
MOE__PRIVATE int32_t moe__machine_processor(const moe__machine *m, const moe__nodes *nodes,
                                            int32_t thread) {
    const int32_t k = moe__nodes_of(nodes, thread), n = m->first[k + 1] - m->first[k];
    return n > 0 ? m->order[m->first[k] + (thread - nodes->first[k]) % n] : 0;
}

// The calling thread runs on these processors only. Returns whether the system agreed.
MOE__PRIVATE int moe__machine_bind(const uint64_t *mask) {
#if defined(__linux__)
    return syscall(SYS_sched_setaffinity, 0, (size_t)MOE__MAX_PROCESSORS / 8, mask) == 0;
#else
    return (void)mask, 0;
#endif
}

// ---- binding pages ---------------------------------------------------------------------------

// Where the pages go that the calling thread touches first: Linux's memory policies.
enum { MOE__POLICY_DEFAULT = 0, MOE__POLICY_PREFERRED = 1, MOE__POLICY_INTERLEAVE = 3 };
enum { MOE__POLICY_BITS = 1024 }; // node numbers; the most that Linux is built for
typedef struct moe__policy {
    int mode;
    uint64_t nodes[MOE__POLICY_BITS / 64];
} moe__policy;

// Both return whether the system agreed; containers often refuse.
MOE__PRIVATE int moe__policy_get(moe__policy *policy) {
    memset(policy, 0, sizeof *policy);
#if defined(__linux__) && defined(SYS_get_mempolicy)
    return syscall(SYS_get_mempolicy, &policy->mode, policy->nodes, (long)MOE__POLICY_BITS, NULL,
                   0L) == 0;
#else
    return 0;
#endif
}
MOE__PRIVATE int moe__policy_set(const moe__policy *policy) {
#if defined(__linux__) && defined(SYS_set_mempolicy)
    return syscall(SYS_set_mempolicy, (long)policy->mode,
                   policy->mode == MOE__POLICY_DEFAULT ? NULL : policy->nodes,
                   policy->mode == MOE__POLICY_DEFAULT ? 0L : (long)MOE__POLICY_BITS + 1) == 0;
#else
    return (void)policy, 0;
#endif
}
// In turn on all of the machine's nodes, or near one of them.
MOE__PRIVATE void moe__policy_init(moe__policy *policy, const moe__machine *m, int mode,
                                   int32_t k) {
    memset(policy, 0, sizeof *policy);
    policy->mode = mode;
    for (int32_t i = 0; i < m->n_nodes; i++)
        if ((mode == MOE__POLICY_INTERLEAVE || i == k) && m->node[i] < MOE__POLICY_BITS)
            policy->nodes[m->node[i] / 64] |= (uint64_t)1 << (m->node[i] % 64);
}

// Moves n pages to the nodes `to` where nobody else uses them, or (NULL) only asks; status[i]
// becomes the node of page i, negative if that failed. Returns whether the system agreed.
MOE__PRIVATE int moe__machine_move(const void **pages, const int *to, int n, int *status) {
#if defined(__linux__) && defined(SYS_move_pages)
    return syscall(SYS_move_pages, 0L, (unsigned long)n, pages, to, status,
                   2L /* MPOL_MF_MOVE */) >= 0;
#else
    return (void)pages, (void)to, (void)n, (void)status, 0;
#endif
}

// ==============================================================================================
// >>pool
//
// The team: threads that are created once and sleep between evals. One wake per eval: every
// thread that takes part runs the same job from its first to its last line, and they meet at
// barriers. Those that take no part sleep on.
//
//   caller (thread 0)      --run--> job -> barrier -> ... -> barrier -> return
//   worker 1..n-1  sleep --wake--> job -> barrier -> ... -> barrier -> spin, then sleep
//
// Waiting means spinning for a short time and then sleeping in the kernel; whoever releases the
// others makes a system call only if someone sleeps. A thread spins for less and less time while
// it keeps ending up asleep: it may be taking the processor from those that it waits for.
//
// Threads arrive at a barrier in groups of 16 or less, none across memory nodes; the last of a
// group arrives for it at the root. So the cache line of a counter moves among neighbours only.
//
//   threads  0 1 ... 15 | 16 17 ... 31 | ...        arrived[1], arrived[2], ...
//                     \             /
//                       root, release               arrived[0], release
//
// Commands are written for groups, too, for each that has a worker in the job. Workers that spin
// see that and begin. Of those that sleep, the caller wakes the ones of its own group and the
// first one in each other group, which wakes the rest there: a system call of the caller's for
// each of hundreds of threads would take longer than many a job.
//
//   caller --write--> command[0], command[1], command[2], ...
//          --wake---> 16 --wake--> 17 ... 31
//                     32 --wake--> 33 ... 47
//                     1 ... 15
//
// Words that are spun on lie on cache lines of their own (128 bytes: neighbours are fetched in
// pairs).
// ==============================================================================================

typedef void moe__job_fn(void *context, int thread, int n_threads);

// Threads of a group. Each of them has a bit of its own to sleep by, and is woken by itself.
enum { MOE__POOL_GROUP = 16 };

typedef struct moe__pool_word {
    uint32_t value;
    uint32_t sleepers; // sum of 1 << bit over the threads that sleep, or are about to, until
                       // value changes; if threads use one bit, it only tells that some do
#if !MOE__USE_FUTEX
    pthread_mutex_t mutex;
    pthread_cond_t changed[MOE__POOL_GROUP];
#endif
    char pad[120];
} moe__pool_word;

// A thread of the team; what changes is written by itself.
typedef struct moe__worker {
    struct moe_pool *pool;
    int thread;
    int32_t processor; // it runs there only; -1: anywhere
    pthread_t handle;
    double spin;       // seconds it spins at a barrier before it sleeps
    int n_naps;        // waits since it gave up spinning
    uint64_t waited;   // ticks spent at barriers of the running job
    char pad[128];
} moe__worker;

struct moe_pool {
    moe__pool_word release; // number of barriers passed
    moe__job_fn *job;       // written before command, read by the threads that take part
    void *context;
    uint32_t serial;        // of the last command
    int n_active, leaf;     // threads that take part, those of a group
    double spin;            // seconds that they spin at a barrier, at most,
    int n_yields;           // then how often they let others run before they sleep
    moe_allocator allocator;
    pthread_mutex_t turn; // held by the session whose job runs,
    uintptr_t holder;     // by this thread; 0: by none
    int n_threads;        // the caller's included
    int n_processors;     // that we may use
    double spin_seconds;  // spin of any job at most, and of waiting for one
    int spin_anyway;      // also with more threads than processors: the caller wants it
    moe__nodes nodes;     // of all n_threads; one node if they are not bound
    moe__worker *workers; // n_threads; the first is the caller
    int group;            // so many in a row share a command word
    moe__pool_word *command; // of each group: serial << 11 | threads that take part; see below
    moe__pool_word *arrived; // root, then groups: how many have arrived at the current barrier
    int n_started;
    void *work_memory;    // buffers of the session whose job runs,
    uint8_t *work;        // within it, at a huge page; for the thread that holds the pool
    size_t work_size;
    const void *work_owner; // the session that has laid it out; NULL: none
};

// A worker decides by the command word of its group alone whether it takes part, and as which
// thread of the job. One that does keeps the caller from giving the next command until it has
// come to the last barrier; one that does not may miss any number of commands.
enum { MOE__POOL_COUNT_BITS = 11, MOE__POOL_QUIT = (1 << MOE__POOL_COUNT_BITS) - 1 };
enum { MOE__POOL_STACK = 2 << 20 }; // bytes of a worker's stack

MOE__INLINE void moe__pool_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// A clock that costs nearly nothing, for differences on one thread.
MOE__INLINE uint64_t moe__pool_ticks(void) {
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t ticks;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(ticks));
    return ticks;
#else
    return (uint64_t)(moe__seconds() * 1e9);
#endif
}

// ---- sleeping --------------------------------------------------------------------------------

// A thread that sleeps until a word changes, and one that changes it:
//
//   sleeper                                  waker
//   1. sleepers += 1 << bit                  1. value = another (or has seen that it is)
//   2. is value still the old one?           2. is anybody in sleepers?
//   3. if so: kernel, let me sleep           3. if so: kernel, wake them
//
// Both write before they look, in one order that all threads agree on (SEQ_CST). So of two that
// meet at least one sees what the other wrote: the sleeper does not sleep, or the waker makes its
// call. A call that comes before the sleeper sleeps is not lost either: the kernel compares value
// with the old one itself, under a lock that the waker's call takes too. (Without futexes a mutex
// is that lock.) Nobody sleeps through a change, and nobody calls the kernel if nobody sleeps.

// Sleeps until the bit is woken, if the word is `old`; may end early. bits: sum of 1 << bit.
#if MOE__USE_FUTEX
MOE__PRIVATE void moe__pool_block(moe__pool_word *word, uint32_t old, int bit) {
    syscall(SYS_futex, &word->value, 137 /* FUTEX_WAIT_BITSET_PRIVATE */, old, NULL, NULL,
            (uint32_t)1 << bit);
}
MOE__PRIVATE void moe__pool_wake(moe__pool_word *word, uint32_t bits) {
    syscall(SYS_futex, &word->value, 138 /* FUTEX_WAKE_BITSET_PRIVATE */, INT_MAX, NULL, NULL,
            bits);
}
MOE__INLINE void moe__pool_word_open(moe__pool_word *word) { (void)word; }
MOE__INLINE void moe__pool_word_close(moe__pool_word *word) { (void)word; }
#else
MOE__PRIVATE void moe__pool_block(moe__pool_word *word, uint32_t old, int bit) {
    pthread_mutex_lock(&word->mutex);
    if (__atomic_load_n(&word->value, __ATOMIC_SEQ_CST) == old)
        pthread_cond_wait(&word->changed[bit], &word->mutex);
    pthread_mutex_unlock(&word->mutex);
}
MOE__PRIVATE void moe__pool_wake(moe__pool_word *word, uint32_t bits) {
    pthread_mutex_lock(&word->mutex);
    for (int i = 0; i < MOE__POOL_GROUP; i++)
        if (bits >> i & 1) pthread_cond_broadcast(&word->changed[i]);
    pthread_mutex_unlock(&word->mutex);
}
MOE__PRIVATE void moe__pool_word_open(moe__pool_word *word) {
    pthread_mutex_init(&word->mutex, NULL);
    for (int i = 0; i < MOE__POOL_GROUP; i++) pthread_cond_init(&word->changed[i], NULL);
}
MOE__PRIVATE void moe__pool_word_close(moe__pool_word *word) {
    for (int i = 0; i < MOE__POOL_GROUP; i++) pthread_cond_destroy(&word->changed[i]);
    pthread_mutex_destroy(&word->mutex);
}
#endif

MOE__INLINE int moe__pool_changed(moe__pool_word *word, uint32_t old) {
    return __atomic_load_n(&word->value, __ATOMIC_ACQUIRE) != old;
}

// Spins until the word is not `old`, or the clock is past `end` (0: looks once). Returns whether
// the word has changed.
MOE__PRIVATE int moe__pool_spin(moe__pool_word *word, uint32_t old, double end) {
    if (moe__pool_changed(word, old)) return 1;
    if (end <= 0) return 0;
    do {
        for (int i = 0; i < 64; i++) { // asking the time costs as much as some pauses
            moe__pool_pause();
            if (moe__pool_changed(word, old)) return 1;
        }
    } while (moe__seconds() < end);
    return 0;
}

// Sleeps until the word is not `old`.
MOE__PRIVATE void moe__pool_sleep(moe__pool_word *word, uint32_t old, int bit) {
    __atomic_fetch_add(&word->sleepers, (uint32_t)1 << bit, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&word->value, __ATOMIC_SEQ_CST) == old)
        moe__pool_block(word, old, bit);
    __atomic_fetch_sub(&word->sleepers, (uint32_t)1 << bit, __ATOMIC_SEQ_CST);
}

// Waits until word->value is not `old`: spins for some time, yields the processor some times,
// then sleeps, all threads by the same bit. Returns whether it slept.
MOE__PRIVATE int moe__pool_wait(moe__pool_word *word, uint32_t old, double spin_seconds,
                                int n_yields) {
    if (moe__pool_spin(word, old, spin_seconds > 0 ? moe__seconds() + spin_seconds : 0)) return 0;
    for (int i = 0; i < n_yields; i++) {
        sched_yield();
        if (moe__pool_changed(word, old)) return 0;
    }
    moe__pool_sleep(word, old, 0);
    return 1;
}

// Changes a word that all wait for by the same bit.
MOE__PRIVATE void moe__pool_set(moe__pool_word *word, uint32_t value) {
    __atomic_store_n(&word->value, value, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&word->sleepers, __ATOMIC_SEQ_CST)) moe__pool_wake(word, 1);
}

// How long a thread spins at its next barrier, at most max. On a crowded machine those it waits
// for may be waiting for its processor. So a thread that slept in spite of spinning spins half
// as long the next time; below an 8th of max not at all, and then tries again every 32nd time.
MOE__PRIVATE double moe__pool_budget(moe__worker *worker, double max) {
    if (worker->spin > 0 || max <= 0) return max <= 0 ? 0 : worker->spin;
    return ++worker->n_naps % 32 == 0 ? max : 0;
}
MOE__PRIVATE void moe__pool_learn(moe__worker *worker, double max, double budget, int slept) {
    if (budget <= 0) return;
    worker->spin = !slept                     ? 2 * worker->spin + max / 8
                   : worker->spin >= max / 8 ? worker->spin / 2
                                             : 0;
    if (worker->spin > max) worker->spin = max;
}

// ---- barrier and jobs ------------------------------------------------------------------------

// Threads of a group: at most 16, equally many, of one node if nodes have enough.
MOE__PRIVATE int moe__pool_leaf(int n_threads, int n_nodes) {
    enum { LEAST = 4 };
    int on_node = (n_threads + n_nodes - 1) / n_nodes;
    if (on_node < LEAST) on_node = n_threads;
    const int groups = (on_node + MOE__POOL_GROUP - 1) / MOE__POOL_GROUP;
    return (on_node + groups - 1) / groups;
}

// Counts this thread; returns whether it is the last of all. The last of a group has set its
// counter back before it counts for the group: nobody looks at it again before the release.
MOE__PRIVATE int moe__pool_arrive(moe_pool *pool, int thread, int n) {
    const int leaf = pool->leaf, groups = (n + leaf - 1) / leaf, group = thread / leaf;
    moe__pool_word *word = &pool->arrived[groups > 1 ? 1 + group : 0];
    const int size = (int)moe__min(leaf, n - group * leaf);
    if (__atomic_add_fetch(&word->value, 1, __ATOMIC_ACQ_REL) != (uint32_t)size) return 0;
    __atomic_store_n(&word->value, 0, __ATOMIC_RELAXED);
    if (groups == 1) return 1;
    if (__atomic_add_fetch(&pool->arrived[0].value, 1, __ATOMIC_ACQ_REL) != (uint32_t)groups)
        return 0;
    __atomic_store_n(&pool->arrived[0].value, 0, __ATOMIC_RELAXED);
    return 1;
}

// Returns whether it had to wait. What belongs to the job is read before this thread counts as
// arrived: at the last barrier the next job may be prepared as soon as all have.
MOE__PRIVATE int moe__pool_meet(moe_pool *pool, moe__worker *worker, int thread) {
    const int n = pool->n_active, n_yields = pool->n_yields;
    const double max = pool->spin;
    if (n == 1) return 0;
    const uint32_t passed = __atomic_load_n(&pool->release.value, __ATOMIC_RELAXED);
    if (moe__pool_arrive(pool, thread, n)) {
        moe__pool_set(&pool->release, passed + 1);
        return 0;
    }
    if (__atomic_load_n(&pool->release.value, __ATOMIC_ACQUIRE) != passed) return 0;
    const double budget = moe__pool_budget(worker, max);
    const int slept = moe__pool_wait(&pool->release, passed, budget, n_yields);
    moe__pool_learn(worker, max, budget, slept);
    return 1;
}

// The worker that is thread `thread` of a job of n: those that take part are spread evenly, so
// that all nodes have their share of a small job, too.
MOE__INLINE int moe__pool_worker_of(const moe_pool *pool, int thread, int n) {
    return (int)((int64_t)thread * pool->n_threads / n);
}
// How many workers before worker `w` take part in a job of n.
MOE__INLINE int moe__pool_rank(const moe_pool *pool, int w, int n) {
    return (int)(((int64_t)w * n + pool->n_threads - 1) / pool->n_threads);
}
// The first worker from `w` on that takes part in a job of n; n_threads or more: none. All take
// part in MOE__POOL_QUIT.
MOE__INLINE int moe__pool_next(const moe_pool *pool, int w, int n) {
    return moe__pool_worker_of(pool, moe__pool_rank(pool, w, n), n);
}

// Every thread of the running job calls this equally often. What one wrote before it, all see
// after it. thread: as the job was told.
MOE__PRIVATE void moe__pool_barrier(moe_pool *pool, int thread) {
    moe__worker *worker = &pool->workers[moe__pool_worker_of(pool, thread, pool->n_active)];
    const uint64_t begin = moe__pool_ticks();
    if (!moe__pool_meet(pool, worker, thread)) return;
    const uint64_t end = moe__pool_ticks();
    if (end > begin) worker->waited += end - begin;
}

// A thread's part in a job. Waiting for the end is not counted: the caller may read by then.
MOE__PRIVATE void moe__pool_work(moe_pool *pool, moe__worker *worker, int thread, int n) {
    worker->waited = 0;
    pool->job(pool->context, thread, n);
    moe__pool_meet(pool, worker, thread);
}

// Signals meant for the program are handled by its own threads: workers are created while they
// are blocked, and inherit that. Those that report a fault of the running instruction stay, and
// so do the two that the C library uses itself. Returns what was blocked before.
MOE__PRIVATE uint64_t moe__pool_block_signals(void) {
    uint64_t saved = 0;
#if defined(__linux__)
    const unsigned keep[] = {4, 5, 6, 7, 8, 11, 32, 33}; // ILL TRAP ABRT BUS FPE SEGV, libc's
    uint64_t mask = ~(uint64_t)0;
    for (size_t i = 0; i < sizeof keep / sizeof keep[0]; i++)
        mask &= ~((uint64_t)1 << (keep[i] - 1));
    syscall(SYS_rt_sigprocmask, 0 /* SIG_BLOCK */, &mask, &saved, sizeof mask);
#endif
    return saved;
}
MOE__PRIVATE void moe__pool_unblock_signals(uint64_t saved) {
#if defined(__linux__)
    syscall(SYS_rt_sigprocmask, 2 /* SIG_SETMASK */, &saved, NULL, sizeof saved);
#else
    (void)saved;
#endif
}

// The calling thread runs on the worker's processor; saved (or NULL) gets what it ran on before.
MOE__PRIVATE int moe__pool_bind(const moe__worker *worker, uint64_t *saved) {
    uint64_t mask[MOE__MAX_PROCESSORS / 64];
    if (worker->processor < 0 || (saved && !moe__machine_affinity(saved))) return 0;
    memset(mask, 0, sizeof mask);
    mask[worker->processor / 64] = (uint64_t)1 << (worker->processor % 64);
    return moe__machine_bind(mask);
}

// Wakes those of the workers `first` to `last` - 1, all of one group, that take part in a job of
// n and sleep. Their command has been written.
MOE__PRIVATE void moe__pool_call(moe_pool *pool, int first, int last, int n) {
    if (first >= last) return;
    const int group = first / pool->group;
    moe__pool_word *word = &pool->command[group];
    const uint32_t sleepers = __atomic_load_n(&word->sleepers, __ATOMIC_SEQ_CST);
    uint32_t bits = 0;
    if (!sleepers) return; // spares the hot path the divisions
    for (int w = moe__pool_next(pool, first, n); w < last; w = moe__pool_next(pool, w + 1, n))
        bits |= (uint32_t)1 << (w - group * pool->group);
    if (bits & sleepers) moe__pool_wake(word, bits & sleepers);
}

// The first worker of the group behind that of `w`.
MOE__INLINE int moe__pool_beyond(const moe_pool *pool, int w) {
    return (int)moe__min((w / pool->group + 1) * pool->group, pool->n_threads);
}

// The first worker of a group that takes part calls the others: in its own, the caller.
MOE__PRIVATE void moe__pool_pass_on(moe_pool *pool, int w, int n) {
    if (moe__pool_next(pool, w / pool->group * pool->group, n) == w)
        moe__pool_call(pool, w + 1, moe__pool_beyond(pool, w), n);
}

// Tells n - 1 workers to begin, or all to end (MOE__POOL_QUIT).
MOE__PRIVATE void moe__pool_command(moe_pool *pool, int n) {
    const uint32_t command = ++pool->serial << MOE__POOL_COUNT_BITS | (uint32_t)n;
    for (int w = moe__pool_next(pool, 1, n); w < pool->n_threads;
         w = moe__pool_next(pool, moe__pool_beyond(pool, w), n))
        __atomic_store_n(&pool->command[w / pool->group].value, command, __ATOMIC_SEQ_CST);
    for (int w = moe__pool_next(pool, pool->group, n); w < pool->n_threads;
         w = moe__pool_next(pool, moe__pool_beyond(pool, w), n))
        moe__pool_call(pool, w, w + 1, n);
    moe__pool_pass_on(pool, 0, n);
}

// Waits for a command in which the worker takes part, and returns it; seen: the one before.
// Those for others of its group neither wake it nor give it more time to spin.
MOE__PRIVATE uint32_t moe__pool_await(const moe__worker *worker, uint32_t seen) {
    const moe_pool *pool = worker->pool;
    const int w = worker->thread;
    moe__pool_word *word = &pool->command[w / pool->group];
    double end = pool->spin_seconds > 0 ? moe__seconds() + pool->spin_seconds : 0;
    for (;;) {
        if (!moe__pool_spin(word, seen, end)) {
            moe__pool_sleep(word, seen, w % pool->group);
            end = 0;
        }
        seen = __atomic_load_n(&word->value, __ATOMIC_ACQUIRE);
        if (moe__pool_next(pool, w, (int)(seen & MOE__POOL_QUIT)) == w) return seen;
        if (end > 0 && moe__seconds() >= end) end = 0;
    }
}

MOE__PRIVATE void *moe__pool_worker(void *argument) {
    moe__worker *worker = (moe__worker *)argument;
    moe_pool *pool = worker->pool;
    uint32_t command = 0;
    fesetenv(FE_DFL_ENV); // not that of the thread that opened the pool
    moe__pool_bind(worker, NULL);
    for (;;) {
        command = moe__pool_await(worker, command);
        const int n = (int)(command & MOE__POOL_QUIT);
        moe__pool_pass_on(pool, worker->thread, n);
        if (n == MOE__POOL_QUIT) return NULL;
        moe__pool_work(pool, worker, moe__pool_rank(pool, worker->thread, n), n);
    }
}

// Callers from several threads take turns. A callback runs while its thread holds the pool, and
// must not ask for it again: it would wait for itself.
MOE__INLINE int moe__pool_is_held(const moe_pool *pool) {
    return __atomic_load_n(&pool->holder, __ATOMIC_RELAXED) == (uintptr_t)pthread_self();
}
MOE__INLINE void moe__pool_hold(moe_pool *pool) {
    pthread_mutex_lock(&pool->turn);
    __atomic_store_n(&pool->holder, (uintptr_t)pthread_self(), __ATOMIC_RELAXED);
}
MOE__INLINE void moe__pool_release(moe_pool *pool) {
    __atomic_store_n(&pool->holder, (uintptr_t)0, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&pool->turn);
}

// Runs job(context, thread, n_threads) on the calling thread (thread 0), which holds the pool,
// and n_threads - 1 workers; returns when all are done. Returns the seconds it took, and in
// waited (or NULL) those that each thread spent at barriers.
MOE__PRIVATE double moe__pool_run_held(moe_pool *pool, int n_threads, moe__job_fn *job,
                                       void *context, double *waited) {
    uint64_t saved[MOE__MAX_PROCESSORS / 64];
    fenv_t callers;
    moe__floats_begin(&callers);
    pool->job = job;
    pool->context = context;
    pool->n_active = n_threads;
    pool->leaf = moe__pool_leaf(n_threads, pool->nodes.n);
    // With more threads than processors, spinning keeps the threads that are waited for from
    // working, and handing on the processor is cheaper than sleeping and being woken.
    const int crowded = n_threads > pool->n_processors;
    pool->spin = crowded && !pool->spin_anyway ? 0 : pool->spin_seconds;
    pool->n_yields = crowded ? 8 : 0;
    const int bound = n_threads > 1 && moe__pool_bind(&pool->workers[0], saved);
    const double begin = moe__seconds();
    const uint64_t ticks = moe__pool_ticks();
    if (n_threads > 1) moe__pool_command(pool, n_threads);
    moe__pool_work(pool, &pool->workers[0], 0, n_threads);
    const double seconds = moe__seconds() - begin;
    const double second = (double)(moe__pool_ticks() - ticks) / (seconds > 0 ? seconds : 1);
    for (int i = 0; i < n_threads && waited; i++) {
        const double all = (double)pool->workers[moe__pool_worker_of(pool, i, n_threads)].waited;
        waited[i] = second <= 0 ? 0 : all < second * seconds ? all / second : seconds;
    }
    if (bound) moe__machine_bind(saved);
    moe__floats_end(&callers);
    return seconds;
}
MOE__PRIVATE double moe__pool_run(moe_pool *pool, int n_threads, moe__job_fn *job, void *context,
                                  double *waited) {
    moe__pool_hold(pool);
    const double seconds = moe__pool_run_held(pool, n_threads, job, context, waited);
    moe__pool_release(pool);
    return seconds;
}

// The nodes of the threads of a job of n.
MOE__PRIVATE void moe__pool_nodes(const moe_pool *pool, int n, moe__nodes *nodes) {
    nodes->n = pool->nodes.n;
    for (int32_t k = 0; k < nodes->n; k++)
        nodes->first[k] = moe__pool_rank(pool, pool->nodes.first[k], n);
    nodes->first[nodes->n] = n;
}

// With one token, rows of a thread begin at multiples of ROW_UNIT (more, if a type interleaves
// more), columns at those of LINE: one cache line of results.
enum { MOE__ROW_UNIT = 2, MOE__LINE = 16 };

// The part of `total` things that belongs to `thread` of n: *begin <= i < *end. Parts are
// multiples of `unit` (but for the last) and differ by at most one unit.
MOE__INLINE void moe__pool_range(int64_t total, int64_t unit, int thread, int n, int64_t *begin,
                                 int64_t *end) {
    int64_t units = (total + unit - 1) / unit;
    *begin = moe__min(total, units * thread / n * unit);
    *end = moe__min(total, units * (thread + 1) / n * unit);
}

MOE__PRIVATE int moe__pool_default_threads(void) {
    moe__machine machine;
    moe__machine_this(&machine);
    return moe__machine_threads(&machine, "");
}

// ---- public ----------------------------------------------------------------------------------

// Where each thread runs, and how long those that wait may spin.
MOE__PRIVATE void moe__pool_settle(moe_pool *pool, const moe__machine *machine, int pin,
                                   int spin_us) {
    pool->n_processors = moe__machine_quota("", machine->n_processors);
    moe__nodes_single(&pool->nodes, pool->n_threads);
    if (pin) moe__machine_nodes(machine, pool->n_threads, &pool->nodes);
    pool->group = moe__pool_leaf(pool->n_threads, pool->nodes.n);
    pool->spin_seconds = 1e-6 * (spin_us < 0 ? 0 : spin_us ? spin_us : 50);
    pool->spin_anyway = spin_us > 0;
    for (int i = 0; i < pool->n_threads; i++) {
        moe__worker *worker = &pool->workers[i];
        worker->pool = pool;
        worker->thread = i;
        worker->spin = pool->spin_seconds;
        worker->processor = pin ? moe__machine_processor(machine, &pool->nodes, i) : -1;
    }
}

MOE__PRIVATE void moe__pool_free(moe_pool *pool) {
    const moe_allocator allocator = pool->allocator;
    moe__free(&allocator, pool->work_memory);
    moe__free(&allocator, pool->arrived);
    moe__free(&allocator, pool->command);
    moe__free(&allocator, pool->workers);
    moe__free(&allocator, pool);
}
// Memory of a pool of n threads, all zero; NULL: there is not enough.
MOE__PRIVATE moe_pool *moe__pool_alloc(const moe_allocator *allocator, int n) {
    const size_t n_words = 1 + ((size_t)n + 3) / 4; // groups have 4 threads or more
    moe_pool *pool = (moe_pool *)moe__alloc(allocator, sizeof *pool);
    if (!pool) return NULL;
    pool->allocator = *allocator;
    pool->n_threads = n;
    pool->n_active = 1;
    pool->workers = (moe__worker *)moe__alloc(allocator, (size_t)n * sizeof *pool->workers);
    pool->command = (moe__pool_word *)moe__alloc(allocator, n_words * sizeof *pool->command);
    pool->arrived = (moe__pool_word *)moe__alloc(allocator, n_words * sizeof *pool->arrived);
    if (pool->workers && pool->command && pool->arrived) return pool;
    moe__pool_free(pool);
    return NULL;
}
MOE__INLINE int moe__pool_groups(const moe_pool *pool) {
    return (pool->n_threads + pool->group - 1) / pool->group;
}

// Creates the workers. Returns 0 or why the system refused number n_started. Their stacks have
// the same size everywhere: some systems give 128 KiB, and kernels compiled with -O0 or a
// sanitizer take 400.
MOE__PRIVATE int moe__pool_start(moe_pool *pool) {
    pthread_attr_t stack;
    int code = pthread_attr_init(&stack);
    pool->n_started = 1;
    if (code) return code;
    const uint64_t signals = moe__pool_block_signals();
    code = pthread_attr_setstacksize(&stack, MOE__POOL_STACK);
    for (; !code && pool->n_started < pool->n_threads; pool->n_started += !code) {
        moe__worker *worker = &pool->workers[pool->n_started];
        code = pthread_create(&worker->handle, &stack, moe__pool_worker, worker);
    }
    pthread_attr_destroy(&stack);
    moe__pool_unblock_signals(signals);
    return code;
}

MOE_API moe_pool *moe_pool_open(const moe_pool_options *options, moe_error *error) {
    moe_allocator allocator;
    moe__machine machine;
    uint64_t mask[MOE__MAX_PROCESSORS / 64];
    int n = options ? options->n_threads : 0;
    const int pin = options && options->pin > 0;
    if (moe__allocator_init(&allocator, options ? &options->allocator : NULL, error)) return NULL;
    if (n < 0 || n > MOE_MAX_THREADS) {
        moe__fail(error, MOE_ERROR_ARGUMENT, "n_threads", "n_threads is %d, not 0..%d", n,
                  (int)MOE_MAX_THREADS);
        return NULL;
    }
    memset(&machine, 0, sizeof machine);
    if (n == 0 || pin) moe__machine_this(&machine); // two files per processor: only if needed
    else machine.n_processors = moe__machine_affinity(mask);
    if (n == 0) n = moe__machine_threads(&machine, "");
    moe_pool *pool = moe__pool_alloc(&allocator, n);
    if (!pool) {
        moe__fail(error, MOE_ERROR_MEMORY, "pool", "no memory for a pool of %d threads", n);
        return NULL;
    }
    moe__pool_settle(pool, &machine, pin, options ? options->spin_us : 0);
    pthread_mutex_init(&pool->turn, NULL);
    moe__pool_word_open(&pool->release);
    for (int i = 0; i < moe__pool_groups(pool); i++) moe__pool_word_open(&pool->command[i]);
    const int code = moe__pool_start(pool);
    if (code) {
        moe__fail(error, MOE_ERROR_THREAD, "pthread_create",
                  "the system refused thread %d of %d (error %d)", pool->n_started + 1, n, code);
        moe_pool_close(pool);
        return NULL;
    }
    return pool;
}

MOE_API void moe_pool_close(moe_pool *pool) {
    if (!pool) return;
    moe__pool_command(pool, MOE__POOL_QUIT);
    for (int i = 1; i < pool->n_started; i++) pthread_join(pool->workers[i].handle, NULL);
    for (int i = 0; i < moe__pool_groups(pool); i++) moe__pool_word_close(&pool->command[i]);
    moe__pool_word_close(&pool->release);
    pthread_mutex_destroy(&pool->turn);
    moe__pool_free(pool);
}

MOE_API int32_t moe_pool_threads(const moe_pool *pool) { return pool ? pool->n_threads : 0; }

// ==============================================================================================
// >>pages
//
// Files in memory, and the pages that they lie in. How fast weights are read depends on them:
//
//   2 MiB   One entry of the page tables leads to 512 times 4 KiB. Anonymous memory gets such
//           pages with MADV_HUGEPAGE. A mapped file has them where the system caches it in
//           units (folios) of 2 MiB, and if the mapping begins at a multiple of 2 MiB.
//   4 KiB   An entry each. On a virtual machine whose hypervisor keeps page tables of its own,
//           reading through many such entries may be several times slower.
//
// The program that read a file first decided in which folios it is cached, so that the speed of a
// mapping cannot be known: it is measured, against anonymous memory, on a sample of what is cached
// (moe__probe_run). Where it is much slower, pages are made anew, the cheapest way first:
//
//   collapse   the system makes 2 MiB folios of what it has cached (few kernels can, for files)
//   copy       chunks are copied to anonymous huge pages and put in the place of the mapping;
//              the cache behind them is dropped, so that memory is needed once
//   reread     the cache is dropped and read again, through a mapping that asks for huge folios
//
// The address of a byte never changes: mremap puts a finished copy where the mapping was, in one
// step, so that other threads may read on meanwhile.
// ==============================================================================================

// Sizes for which tests set smaller ones.
#ifndef MOE__PAGES_CHUNK
#define MOE__PAGES_CHUNK (1 << 24) // bytes that a thread touches, copies or replaces at once;
#endif                             // a multiple of MOE__PAGES_HUGE
#ifndef MOE__PROBE_WINDOW
#define MOE__PROBE_WINDOW (1 << 19) // bytes of a sample: as much as threads read at once from
#endif                              // an expert's matrix
#ifndef MOE__PAGING_SECONDS
#define MOE__PAGING_SECONDS 2.0 // of generating until a mapping is looked at once more
#endif
#ifndef MOE__PAGING_SLOW
#define MOE__PAGING_SLOW 0.7 // of the speed of huge pages: below it a mapping counts as slow
#endif

enum {
    MOE__PAGES_HUGE = 1 << 21, // bytes of a huge page
    MOE__PAGES_TEAM = 16       // most threads that work on pages
};

// Linux's numbers: strict C11 hides some, old headers lack others.
enum {
    MOE__MADV_DONTNEED = 4,
    MOE__MADV_HUGEPAGE = 14,
    MOE__MADV_NOHUGEPAGE = 15,
    MOE__MADV_POPULATE_READ = 22,
    MOE__MADV_COLLAPSE = 25
};
#if defined(MAP_ANONYMOUS)
#define MOE__MAP_ANONYMOUS MAP_ANONYMOUS
#else
#define MOE__MAP_ANONYMOUS 0x20
#endif

// A file in memory.
typedef struct moe__pages {
    uint8_t *data;     // NULL: nothing
    uint64_t size;
    int file;          // open as long as pages may be replaced, else -1
    uint64_t n_copied; // atomic: bytes that lie in anonymous memory
} moe__pages;

// ---- calls of the system ---------------------------------------------------------------------

// Advice for the whole pages inside the range. Returns 0 or an errno, and leaves errno alone.
MOE__PRIVATE int moe__pages_advise(const uint8_t *memory, uint64_t size, int advice) {
#if defined(__linux__) && defined(SYS_madvise)
    const uintptr_t page = moe__machine_page();
    const uintptr_t start = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)size) & ~(page - 1);
    const int saved = errno;
    int code = 0;
    if (start < end && syscall(SYS_madvise, start, end - start, (long)advice)) code = errno;
    errno = saved;
    return code;
#else
    return (void)memory, (void)size, (void)advice, EINVAL;
#endif
}

// Gives back what the system has cached of a range of the file, if nobody else maps it.
MOE__PRIVATE void moe__pages_drop(int file, uint64_t from, uint64_t to) {
#if defined(__linux__) && defined(SYS_fadvise64)
    const int saved = errno;
    syscall(SYS_fadvise64, file, (long)from, (long)(to - from), 4L /* POSIX_FADV_DONTNEED */);
    errno = saved;
#else
    (void)file, (void)from, (void)to;
#endif
}

// Reads bytes from .. to - 1 of the file. Returns 0, an errno, or -1 if the file ends before.
MOE__PRIVATE int moe__pages_read(int file, uint8_t *out, uint64_t from, uint64_t to) {
    while (from < to) {
#if defined(__linux__) && defined(SYS_pread64)
        const long got = syscall(SYS_pread64, file, out, (size_t)(to - from), (long)from);
#else
        const long got = lseek(file, (off_t)from, SEEK_SET) < 0
                             ? -1 : (long)read(file, out, (size_t)(to - from));
#endif
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got < 0 ? errno : -1;
        out += got;
        from += (uint64_t)got;
    }
    return 0;
}

// Is all of a range of whole pages in memory? Windows are MOE__PAGES_HUGE bytes at most.
MOE__PRIVATE int moe__pages_resident(const uint8_t *memory, uint64_t size) {
#if defined(__linux__) && defined(SYS_mincore)
    unsigned char there[MOE__PAGES_HUGE / 4096];
    const size_t page = moe__machine_page(), n = (size_t)size / page;
    if (n > sizeof there || syscall(SYS_mincore, memory, (size_t)size, there)) return 0;
    for (size_t i = 0; i < n; i++)
        if (!(there[i] & 1)) return 0;
    return 1;
#else
    return (void)memory, (void)size, 0;
#endif
}

// Bytes on huge pages within memory[0 .. size), of files and anonymous ones, from the text of
// /proc/self/smaps: ranges "7f00-7f40 rw-p ..." each followed by lines such as
// "AnonHugePages:  2048 kB".
MOE__PRIVATE uint64_t moe__pages_huge(const char *path, const void *memory, uint64_t size) {
    static const char *const names[] = {"AnonHugePages:", "FilePmdMapped:"};
    const uint64_t first = (uint64_t)(uintptr_t)memory, last = first + size;
    char buffer[2048], line[128];
    size_t length = 0;
    uint64_t overlap = 0, sum = 0;
    ssize_t n;
    int fd = open(path, O_RDONLY | MOE__O_CLOEXEC);
    if (fd < 0) return 0;
    while ((n = read(fd, buffer, sizeof buffer)) > 0)
        for (ssize_t i = 0; i < n; i++) {
            char *end;
            if (buffer[i] != '\n') {
                if (length < sizeof line - 1) line[length++] = buffer[i];
                continue;
            }
            line[length] = 0;
            length = 0;
            const uint64_t from = strtoull(line, &end, 16);
            if (end != line && *end == '-') {
                const uint64_t to = strtoull(end + 1, NULL, 16);
                overlap = to > first && from < last
                              ? (to < last ? to : last) - (from > first ? from : first) : 0;
            }
            for (int k = 0; k < 2 && overlap; k++)
                if (!strncmp(line, names[k], strlen(names[k]))) {
                    const uint64_t huge = strtoull(line + strlen(names[k]), NULL, 10) << 10;
                    sum += huge < overlap ? huge : overlap;
                }
        }
    close(fd);
    return sum;
}

// Makes the page tables' entries of a range, where the system can do so for many at once.
MOE__PRIVATE void moe__pages_touch(const uint8_t *memory, uint64_t size) {
    if (moe__pages_advise(memory, size, MOE__MADV_POPULATE_READ) != EINVAL) return;
    for (uint64_t i = 0; i < size; i += 4096) (void)*(const volatile uint8_t *)(memory + i);
}

// ---- mappings --------------------------------------------------------------------------------

// Anonymous memory at a multiple of 2 MiB; NULL if there is none. Given back by munmap.
MOE__PRIVATE uint8_t *moe__pages_take(uint64_t size, int protection) {
    const uintptr_t huge = MOE__PAGES_HUGE, page = moe__machine_page();
    const uintptr_t whole = ((uintptr_t)size + page - 1) & ~(page - 1);
    void *raw = mmap(NULL, whole + huge, protection, MAP_PRIVATE | MOE__MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    const uintptr_t begin = (uintptr_t)raw, first = (begin + huge - 1) & ~(huge - 1);
    if (first > begin) munmap(raw, first - begin);
    if (begin + huge > first) munmap((void *)(first + whole), begin + huge - first);
    return (uint8_t *)first;
}

// Maps the file; it stays open if `keep`, so that pages can be replaced. Returns 0 or an errno.
MOE__PRIVATE int moe__pages_map(moe__pages *p, int file, uint64_t size, int keep) {
    uint8_t *address = moe__pages_take(size, PROT_NONE); // NULL: any other will do
    void *mapping = mmap(address, (size_t)size, PROT_READ,
                         MAP_PRIVATE | (address ? MAP_FIXED : 0), file, 0);
    const int code = errno;
    if (mapping == MAP_FAILED) {
        if (address) munmap(address, (size_t)size);
        return code;
    }
    p->data = (uint8_t *)mapping;
    p->size = size;
    p->file = keep ? file : -1;
    moe__pages_advise(p->data, size, MOE__MADV_HUGEPAGE); // before anything touches it
    return 0;
}

MOE__PRIVATE void moe__pages_close(moe__pages *p) {
    if (p->data) munmap(p->data, (size_t)p->size);
    if (p->data && p->file >= 0) close(p->file);
    p->data = NULL;
}

// ---- chunks, by a team -----------------------------------------------------------------------

// Pieces of a range that threads take in turn.
typedef struct moe__chunks {
    int (*work)(void *context, uint64_t from, uint64_t to); // 0, or a code that ends it all
    void *context;
    int (*report)(void *user, uint64_t done); // may be NULL; on the caller's thread; 0 or a code
    void *user;
    uint64_t next, size; // next: atomic
    uint64_t done;       // atomic
    uint64_t reported;   // what report was last told
    int code;            // atomic: the first one that was not 0
} moe__chunks;

MOE__PRIVATE int moe__chunks_report(moe__chunks *p) {
    p->reported = __atomic_load_n(&p->done, __ATOMIC_RELAXED);
    return p->report(p->user, p->reported);
}

MOE__PRIVATE void moe__chunks_job(void *context, int thread, int n_threads) {
    moe__chunks *p = (moe__chunks *)context;
    (void)n_threads;
    while (!__atomic_load_n(&p->code, __ATOMIC_RELAXED)) {
        const uint64_t from = __atomic_fetch_add(&p->next, MOE__PAGES_CHUNK, __ATOMIC_RELAXED);
        if (from >= p->size) return;
        const uint64_t left = p->size - from;
        const uint64_t size = left < MOE__PAGES_CHUNK ? left : MOE__PAGES_CHUNK;
        int expected = 0, code = p->work(p->context, from, from + size);
        if (!code) __atomic_fetch_add(&p->done, size, __ATOMIC_RELAXED);
        if (!code && thread == 0 && p->report) code = moe__chunks_report(p);
        if (code)
            __atomic_compare_exchange_n(&p->code, &expected, code, 0, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED);
    }
}

// A team for work on pages; NULL if there is no memory or no thread for it.
MOE__PRIVATE moe_pool *moe__pages_team(const moe_allocator *allocator) {
    moe_pool_options options;
    memset(&options, 0, sizeof options);
    options.allocator = *allocator;
    options.n_threads = (int32_t)moe__min(moe__pool_default_threads(), MOE__PAGES_TEAM);
    return moe_pool_open(&options, NULL);
}

// Works off all chunks, with the pool's threads or (NULL) a team of its own. Returns the code.
MOE__PRIVATE int moe__chunks_run(moe__chunks *p, moe_pool *pool, const moe_allocator *allocator) {
    const uint64_t n_chunks = (p->size - p->next + MOE__PAGES_CHUNK - 1) / MOE__PAGES_CHUNK;
    moe_pool *team = pool || n_chunks < 2 ? NULL : moe__pages_team(allocator);
    if (!pool) pool = team;
    int64_t n = pool ? moe__min(pool->n_threads, MOE__PAGES_TEAM) : 1;
    if ((uint64_t)n > n_chunks) n = (int64_t)n_chunks;
    if (n > 1) moe__pool_run(pool, (int)n, moe__chunks_job, p, NULL);
    else moe__chunks_job(p, 0, 1);
    moe_pool_close(team);
    if (!p->code && p->report && p->reported < p->done) p->code = moe__chunks_report(p);
    return p->code;
}

// ---- copies ----------------------------------------------------------------------------------

// A file that is read into anonymous memory, or touched, by a team.
typedef struct moe__pages_load {
    moe__pages *pages;
    int file;
    int (*report)(void *user, uint64_t done); // may be NULL
    void *user;
} moe__pages_load;

MOE__PRIVATE int moe__pages_load_chunk(void *context, uint64_t from, uint64_t to) {
    const moe__pages_load *load = (const moe__pages_load *)context;
    const int code = moe__pages_read(load->file, load->pages->data + from, from, to);
    if (!code) moe__pages_drop(load->file, from, to);
    return code;
}
MOE__PRIVATE int moe__pages_touch_chunk(void *context, uint64_t from, uint64_t to) {
    const moe__pages_load *load = (const moe__pages_load *)context;
    moe__pages_touch(load->pages->data + from, to - from);
    return 0;
}

MOE__PRIVATE int moe__pages_load_run(moe__pages_load *load, const moe_allocator *allocator,
                                     int (*work)(void *, uint64_t, uint64_t)) {
    moe__chunks chunks = {work, load, load->report, load->user, 0, load->pages->size, 0, 0, 0};
    return moe__chunks_run(&chunks, NULL, allocator);
}

// Reads the file into huge (or small) pages. Returns 0, an errno, -1 if the file became shorter,
// or what report returned.
MOE__PRIVATE int moe__pages_copy(moe__pages_load *load, uint64_t size, int small,
                                 const moe_allocator *allocator) {
    moe__pages *p = load->pages;
    uint8_t *memory = moe__pages_take(size, PROT_READ | PROT_WRITE);
    if (!memory) return ENOMEM;
    p->data = memory;
    p->size = size;
    p->file = -1;
    p->n_copied = size;
    moe__pages_advise(memory, size + moe__machine_page() - 1,
                      small ? MOE__MADV_NOHUGEPAGE : MOE__MADV_HUGEPAGE);
    const int code = moe__pages_load_run(load, allocator, moe__pages_load_chunk);
    if (!code) mprotect(memory, (size_t)size, PROT_READ); // weights are never written
    return code;
}

// Puts a copy on huge pages in the place of bytes from .. to - 1 of the mapping, whole chunks
// but at the end of the file. Threads that read meanwhile read the one or the other, which are
// equal.
MOE__PRIVATE int moe__pages_replace(moe__pages *p, uint64_t from, uint64_t to) {
#if defined(__linux__) && defined(SYS_mremap)
    const size_t page = moe__machine_page();
    const size_t size = ((size_t)(to - from) + page - 1) & ~(page - 1);
    uint8_t *copy = moe__pages_take(size, PROT_READ | PROT_WRITE);
    if (!copy) return ENOMEM;
    moe__pages_advise(copy, size, MOE__MADV_HUGEPAGE);
    int code = moe__pages_read(p->file, copy, from, to);
    if (!code && mprotect(copy, size, PROT_READ)) code = errno;
    if (!code && syscall(SYS_mremap, copy, size, size, 3L /* MAYMOVE, FIXED */,
                         p->data + from) == -1)
        code = errno;
    if (code) {
        munmap(copy, size);
        return code;
    }
    moe__pages_drop(p->file, from, to);
    __atomic_fetch_add(&p->n_copied, to - from, __ATOMIC_RELAXED);
    return 0;
#else
    return (void)p, (void)from, (void)to, ENOSYS;
#endif
}

// ---- measuring -------------------------------------------------------------------------------

// Measured is the time to read as many bytes from the mapping and from anonymous huge pages; they
// differ in nothing but their pages. For that
// - all threads read, windows of the size in which experts' matrices are read;
// - the sample is larger than most caches, and both are read in turns, so that neither stays there;
// - only windows that the system has cached count: the disk is not measured;
// - the best of some rounds counts: what else the machine does only makes a round slower;
// - when a model is opened all rounds read the same windows, the first time untimed: what the first
//   touch of a page costs is not what reading it costs. Later, when pages have been in use, each
//   round reads windows of its own, once: systems that look which pages are used undo the
//   hypervisor's page tables with each look, and only the first read behind that is slow.
enum { MOE__PROBE_WINDOWS = 64, MOE__PROBE_ROUNDS = 3 };

typedef struct moe__probe {
    moe_pool *pool;
    int in_use;          // the pages have been read for some time
    const uint8_t *window[MOE__PROBE_ROUNDS][MOE__PROBE_WINDOWS]; // [0] of all, if not in_use
    int32_t n_windows;   // the least of any round
    uint8_t *copy;       // as much anonymous memory in huge pages
    double fill_seconds; // for the page tables' entries of the windows of the first round
    double seconds[2][MOE__PROBE_ROUNDS]; // of windows, of copy
    uint64_t sum;        // of all that was read, so that it is
} moe__probe;

// What one found: bytes per second.
typedef struct moe__rates {
    double map, copy, fill;
} moe__rates;

MOE__PRIVATE uint64_t moe__probe_sum(const uint8_t *p, size_t size) {
    uint64_t sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (size_t i = 0; i + 64 <= size; i += 64)
        for (int k = 0; k < 8; k++) sum[k] += moe__load_u64(p + i + 8 * k);
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// This thread's windows of a sample, or (NULL) its part of the copy.
MOE__PRIVATE uint64_t moe__probe_read(const moe__probe *probe, const uint8_t *const *windows,
                                      int thread, int n_threads) {
    uint64_t sum = 0;
    for (int32_t i = thread; i < probe->n_windows; i += n_threads)
        sum += moe__probe_sum(windows ? windows[i] : probe->copy + (size_t)i * MOE__PROBE_WINDOW,
                              MOE__PROBE_WINDOW);
    return sum;
}

// One of the threads: fills page tables and the copy, then reads mapping and copy in turns.
MOE__PRIVATE void moe__probe_job(void *context, int thread, int n_threads) {
    moe__probe *probe = (moe__probe *)context;
    uint64_t sum = 0;
    double begin;
    for (int32_t i = thread; i < probe->n_windows; i += n_threads)
        for (size_t k = 0; k < MOE__PROBE_WINDOW; k += 4096) // pages appear when written to
            probe->copy[(size_t)i * MOE__PROBE_WINDOW + k] = 1;
    for (int round = 0; round < MOE__PROBE_ROUNDS; round++) {
        const uint8_t *const *windows = probe->window[probe->in_use ? round : 0];
        moe__pool_barrier(probe->pool, thread);
        begin = moe__seconds();
        for (int32_t i = thread; i < probe->n_windows && (probe->in_use || !round); i += n_threads)
            moe__pages_touch(windows[i], MOE__PROBE_WINDOW);
        moe__pool_barrier(probe->pool, thread);
        if (thread == 0 && !round) probe->fill_seconds = moe__seconds() - begin;
        if (!probe->in_use && !round) sum += moe__probe_read(probe, windows, thread, n_threads);
        for (int copy = 0; copy < 2; copy++) {
            moe__pool_barrier(probe->pool, thread);
            begin = moe__seconds();
            sum += moe__probe_read(probe, copy ? NULL : windows, thread, n_threads);
            moe__pool_barrier(probe->pool, thread);
            if (thread == 0) probe->seconds[copy][round] = moe__seconds() - begin;
        }
    }
    __atomic_fetch_add(&probe->sum, sum, __ATOMIC_RELAXED);
}

MOE__PRIVATE double moe__probe_least(const double *x) {
    double least = x[0];
    for (int i = 1; i < MOE__PROBE_ROUNDS; i++) least = x[i] < least ? x[i] : least;
    return least;
}

// Evenly spread windows of n files, those of them that are in memory.
MOE__PRIVATE void moe__probe_windows(moe__probe *probe, const moe__pages *files, int32_t n) {
    const uint64_t n_rounds = probe->in_use ? MOE__PROBE_ROUNDS : 1;
    uint64_t total = 0;
    for (int32_t i = 0; i < n; i++) total += files[i].size / MOE__PROBE_WINDOW;
    if (total < n_rounds * MOE__PROBE_WINDOWS) return;
    probe->n_windows = MOE__PROBE_WINDOWS;
    for (uint64_t round = 0; round < n_rounds; round++) {
        int32_t found = 0;
        for (uint64_t k = round; k < n_rounds * MOE__PROBE_WINDOWS; k += n_rounds) {
            uint64_t at = total * k / (n_rounds * MOE__PROBE_WINDOWS);
            int32_t i = 0;
            for (; at >= files[i].size / MOE__PROBE_WINDOW; i++)
                at -= files[i].size / MOE__PROBE_WINDOW;
            const uint8_t *window = files[i].data + at * MOE__PROBE_WINDOW;
            if (moe__pages_resident(window, MOE__PROBE_WINDOW))
                probe->window[round][found++] = window;
        }
        if (found < probe->n_windows) probe->n_windows = found;
    }
}

// How fast the mapping of n files is read by the pool's threads. Returns whether it was
// measured: not if they are small or less than half of the sample is in memory.
MOE__PRIVATE int moe__probe_run(const moe__pages *files, int32_t n, int in_use, moe_pool *pool,
                                moe__rates *rates) {
    moe__probe probe;
    memset(rates, 0, sizeof *rates);
    memset(&probe, 0, sizeof probe);
    probe.pool = pool;
    probe.in_use = in_use;
    moe__probe_windows(&probe, files, n);
    if (probe.n_windows < MOE__PROBE_WINDOWS / 2) return 0;
    const size_t size = (size_t)probe.n_windows * MOE__PROBE_WINDOW;
    probe.copy = moe__pages_take(size, PROT_READ | PROT_WRITE);
    if (!probe.copy) return 0;
    moe__pages_advise(probe.copy, size, MOE__MADV_HUGEPAGE);
    moe__pool_run(pool, (int)moe__min(pool->n_threads, MOE__PAGES_TEAM), moe__probe_job, &probe,
                  NULL);
    munmap(probe.copy, size);
    rates->map = (double)size / moe__probe_least(probe.seconds[0]);
    rates->copy = (double)size / moe__probe_least(probe.seconds[1]);
    rates->fill = (double)size / probe.fill_seconds;
    return 1;
}

// ---- what AUTO does --------------------------------------------------------------------------

//   when a model is opened                 while it generates, after 2, 4, 8 ... 128 seconds
//   measure: fast, or not cached --------> WATCH, measure: fast -> WATCH
//            slow -> huge pages, DONE                      slow -> COPY, some chunks after each
//                                                                  token -> DONE
// What is done while it generates is done between two tokens, by the threads of one pool; other
// sessions may read the same bytes meanwhile.

// Seconds that filling the page tables at once may take: else pages are faulted in as they are
// read.
#define MOE__PAGING_FILL 0.05
// Bytes per second below which reading a file again is given up.
#define MOE__PAGING_REREAD 5e8

enum {
    MOE__PAGING_BACKOFF = 2,      // how many times longer it is to the next look, after each,
    MOE__PAGING_MAX_WAIT = 64,    // up to so many times MOE__PAGING_SECONDS
    MOE__PAGING_RESERVE = 1 << 28 // bytes that a copy in progress leaves free
};

typedef enum moe__paging_state {
    MOE__PAGING_DONE,  // nothing more is done
    MOE__PAGING_WATCH, // looks again some time later
    MOE__PAGING_COPY   // replaces some chunks after each token
} moe__paging_state;

typedef enum moe__paging_outcome {
    MOE__PAGED_SMALL, // too small to matter
    MOE__PAGED_COLD,  // not cached: there was nothing to measure
    MOE__PAGED_FAST,
    MOE__PAGED_COLLAPSED,
    MOE__PAGED_COPIED, // if only in part
    MOE__PAGED_REREAD,
    MOE__PAGED_NO_ROOM // slow, but neither copied nor read again
} moe__paging_outcome;

// The mapped files of a model.
typedef struct moe__paging {
    moe__pages *files;
    int32_t n_files;
    uint64_t size; // of all
    moe_allocator allocator;
    int (*progress)(void *user, float fraction); // while opening
    void *progress_user;
    moe__paging_outcome outcome;
    moe__rates rates;
    uint64_t room;    // bytes that were free when it was decided
    int state;        // atomic: moe__paging_state
    int busy;         // atomic: one thread at a time goes on
    int64_t left;     // atomic: nanoseconds of generating until the next look
    int64_t interval; // between this look and the one before
    int32_t file;     // the file being worked off,
    uint64_t next;    // where its next chunk begins,
    uint64_t before;  // the bytes of the files before it,
    double begin;     // and when the first was begun, in seconds
} moe__paging;

// How fast is the mapping? Returns whether it could be measured. What looks slow is measured
// twice: a copy is not made for a moment's sake.
MOE__PRIVATE int moe__paging_measure(moe__paging *g, int in_use, moe_pool *pool, int *slow) {
    moe__rates rates;
    *slow = 0;
    for (int i = 0; i < 2; i++) {
        if (!moe__probe_run(g->files, g->n_files, in_use, pool, &rates)) return 0;
        *slow = rates.map < MOE__PAGING_SLOW * rates.copy;
        if (!*slow) break;
    }
    g->rates = rates;
    return 1;
}

MOE__PRIVATE uint64_t moe__paging_copied(const moe__paging *g) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < g->n_files; i++)
        sum += __atomic_load_n(&g->files[i].n_copied, __ATOMIC_RELAXED);
    return sum;
}

MOE__PRIVATE int moe__paging_collapse_chunk(void *context, uint64_t from, uint64_t to) {
    const moe__paging *g = (const moe__paging *)context;
    return moe__pages_advise(g->files[g->file].data + from, to - from, MOE__MADV_COLLAPSE);
}
MOE__PRIVATE int moe__paging_fill_chunk(void *context, uint64_t from, uint64_t to) {
    const moe__paging *g = (const moe__paging *)context;
    moe__pages_touch(g->files[g->file].data + from, to - from);
    return 0;
}
// Memory may be taken by others while a copy is made.
MOE__PRIVATE int moe__paging_replace_chunk(void *context, uint64_t from, uint64_t to) {
    const moe__paging *g = (const moe__paging *)context;
    if (from / MOE__PAGES_CHUNK % 8 == 0 && moe__machine_memory("") < MOE__PAGING_RESERVE)
        return ENOMEM;
    return moe__pages_replace(&g->files[g->file], from, to);
}
// Not if others map the file, so that it stays cached as it is, or if the disk is slow.
MOE__PRIVATE int moe__paging_reread_chunk(void *context, uint64_t from, uint64_t to) {
    const moe__paging *g = (const moe__paging *)context;
    const moe__pages *p = &g->files[g->file];
    const double least = (double)(g->before + from) / MOE__PAGING_REREAD;
    if (from > 8 * (uint64_t)MOE__PAGES_CHUNK && moe__seconds() - g->begin > least)
        return ETIMEDOUT;
    moe__pages_advise(p->data + from, to - from, MOE__MADV_DONTNEED);
    moe__pages_drop(p->file, from, to);
    if (to - from >= MOE__PROBE_WINDOW && moe__pages_resident(p->data + from, MOE__PROBE_WINDOW))
        return EBUSY;
    moe__pages_touch(p->data + from, to - from);
    return 0;
}

MOE__PRIVATE int moe__paging_report(void *context, uint64_t done) {
    const moe__paging *g = (const moe__paging *)context;
    const double fraction = (double)(g->before + done) / (double)g->size;
    return !g->progress || g->progress(g->progress_user, (float)fraction) ? 0 : ECANCELED;
}

// Works off all files. Returns 0 or the code that ended it.
MOE__PRIVATE int moe__paging_all(moe__paging *g, moe_pool *pool,
                                 int (*work)(void *, uint64_t, uint64_t)) {
    int code = 0;
    g->before = 0;
    g->begin = moe__seconds();
    for (g->file = 0; g->file < g->n_files && !code; g->file++) {
        moe__chunks chunks = {work, g, moe__paging_report, g, 0, g->files[g->file].size, 0, 0, 0};
        code = moe__chunks_run(&chunks, pool, &g->allocator);
        g->before += chunks.size;
    }
    return code;
}

// May a copy be made of what is not copied yet? Never of more than half of what is free.
MOE__PRIVATE int moe__paging_fits(moe__paging *g) {
    g->room = moe__machine_memory("");
    for (int32_t i = 0; i < g->n_files; i++)
        if ((uintptr_t)g->files[i].data % MOE__PAGES_HUGE || g->files[i].file < 0) return 0;
    return g->size - moe__paging_copied(g) <= g->room / 2;
}

// The mapping is slow: makes huge pages of it. Returns 0, or ECANCELED.
MOE__PRIVATE int moe__paging_repair(moe__paging *g, moe_pool *pool) {
    int code;
    g->outcome = MOE__PAGED_NO_ROOM;
    if (!moe__pages_advise(g->files[0].data, MOE__PAGES_HUGE, MOE__MADV_COLLAPSE)) {
        code = moe__paging_all(g, pool, moe__paging_collapse_chunk);
        if (code == ECANCELED) return code;
        g->outcome = MOE__PAGED_COLLAPSED;
        if (!code) return 0;
    }
    if (moe__paging_fits(g)) {
        code = moe__paging_all(g, pool, moe__paging_replace_chunk);
        if (moe__paging_copied(g)) g->outcome = MOE__PAGED_COPIED;
    } else if (g->files[0].file >= 0 && g->size <= g->room) {
        code = moe__paging_all(g, pool, moe__paging_reread_chunk);
        if (!code) g->outcome = MOE__PAGED_REREAD;
    } else {
        code = 0;
    }
    return code == ECANCELED ? code : 0;
}

// Looks at the mapping when a model is opened. Returns 0, or ECANCELED.
MOE__PRIVATE int moe__paging_open(moe__paging *g) {
    int code = 0, slow;
    g->outcome = MOE__PAGED_SMALL;
    if (g->size < (uint64_t)MOE__PROBE_WINDOW * MOE__PROBE_WINDOWS) return 0;
    moe_pool *pool = moe__pages_team(&g->allocator);
    if (!pool) return 0;
    g->outcome = MOE__PAGED_COLD;
    g->interval = g->left = (int64_t)(1e9 * MOE__PAGING_SECONDS);
    g->state = MOE__PAGING_WATCH;
    if (moe__paging_measure(g, 0, pool, &slow)) {
        g->outcome = MOE__PAGED_FAST;
        if (slow) {
            code = moe__paging_repair(g, pool);
            g->state = MOE__PAGING_DONE;
        } else if ((double)g->size < MOE__PAGING_FILL * g->rates.fill) {
            code = moe__paging_all(g, pool, moe__paging_fill_chunk);
        }
    }
    moe_pool_close(pool);
    return code;
}

// Replaces the next chunks, one for each of n threads. Returns 1 when there is nothing more to
// do.
MOE__PRIVATE int moe__paging_step(moe__paging *g, moe_pool *pool, int n) {
    moe__chunks chunks = {moe__paging_replace_chunk, g, NULL, NULL, g->next, 0, 0, 0, 0};
    chunks.size = g->next + (uint64_t)n * MOE__PAGES_CHUNK;
    if (chunks.size > g->files[g->file].size) chunks.size = g->files[g->file].size;
    const int code = moe__chunks_run(&chunks, pool, &g->allocator);
    g->next = chunks.size;
    if (g->next == g->files[g->file].size) {
        g->next = 0;
        g->file++;
    }
    return code || g->file == g->n_files;
}

// A look some time later. Returns 1 when it is the last.
MOE__PRIVATE int moe__paging_look(moe__paging *g, moe_pool *pool) {
    int next = MOE__PAGING_WATCH, slow;
    if (moe__paging_measure(g, 1, pool, &slow) && slow) {
        next = moe__paging_fits(g) ? MOE__PAGING_COPY : MOE__PAGING_DONE;
        g->outcome = MOE__PAGED_NO_ROOM;
        g->file = 0;
    }
    if (g->interval / MOE__PAGING_MAX_WAIT < (int64_t)(1e9 * MOE__PAGING_SECONDS))
        g->interval *= MOE__PAGING_BACKOFF;
    __atomic_store_n(&g->left, g->interval, __ATOMIC_RELAXED);
    __atomic_store_n(&g->state, next, __ATOMIC_RELEASE);
    return next == MOE__PAGING_DONE;
}

// Goes on after a generated token: looks again, or copies some more. Returns 1 when something
// came of it.
MOE__PRIVATE int moe__paging_tend(moe__paging *g, double seconds, moe_pool *pool) {
    int finished = 0;
    const int64_t passed = (int64_t)(1e9 * seconds);
    if (__atomic_load_n(&g->state, __ATOMIC_ACQUIRE) == MOE__PAGING_WATCH &&
        __atomic_sub_fetch(&g->left, passed, __ATOMIC_RELAXED) > 0)
        return 0;
    if (__atomic_exchange_n(&g->busy, 1, __ATOMIC_ACQUIRE)) return 0;
    if (g->state == MOE__PAGING_COPY) {
        finished = moe__paging_step(g, pool, (int)moe__min(pool->n_threads, MOE__PAGES_TEAM));
        if (finished) __atomic_store_n(&g->state, MOE__PAGING_DONE, __ATOMIC_RELEASE);
        if (finished && moe__paging_copied(g)) g->outcome = MOE__PAGED_COPIED;
    } else if (g->state == MOE__PAGING_WATCH && __atomic_load_n(&g->left, __ATOMIC_RELAXED) <= 0) {
        finished = moe__paging_look(g, pool);
    }
    __atomic_store_n(&g->busy, 0, __ATOMIC_RELEASE);
    return finished;
}

// Appends to a text of some capacity; what does not fit is cut off.
MOE__PRIVATE MOE__PRINTF(3, 4) void
    moe__paging_write(char *text, size_t capacity, const char *format, ...) {
    const size_t length = strlen(text);
    va_list args;
    va_start(args, format);
    vsnprintf(text + length, capacity - length, format, args);
    va_end(args);
}

// Appends "4.00 GiB" or "4.0 MiB".
MOE__PRIVATE void moe__paging_write_size(char *text, size_t capacity, uint64_t bytes) {
    if (bytes >> 30) moe__paging_write(text, capacity, "%.2f GiB", (double)bytes / 1073741824.0);
    else moe__paging_write(text, capacity, "%.1f MiB", (double)bytes / 1048576.0);
}

// What was done and why.
MOE__PRIVATE void moe__paging_say(const moe__paging *g, char *text, size_t capacity) {
    static const char *const outcomes[] = {
        " mapped", " mapped: not cached, read from the disk as it is used", " mapped",
        " collapsed to huge pages", " copied to huge pages", " read again in huge pages",
        " mapped"}; // of moe__paging_outcome
    const uint64_t n_copied = moe__paging_copied(g);
    text[0] = 0;
    if (n_copied && n_copied < g->size) {
        moe__paging_write_size(text, capacity, n_copied);
        moe__paging_write(text, capacity, " of ");
    }
    moe__paging_write_size(text, capacity, g->size);
    moe__paging_write(text, capacity, "%s", outcomes[g->outcome]);
    if (g->outcome < MOE__PAGED_FAST) return;
    moe__paging_write(text, capacity, ": the mapping reads at %.1f of %.1f GB/s",
                      g->rates.map * 1e-9, g->rates.copy * 1e-9);
    if (g->outcome != MOE__PAGED_NO_ROOM) return;
    moe__paging_write(text, capacity, ", but a copy would take more than half of the free ");
    moe__paging_write_size(text, capacity, g->room);
}

// ==============================================================================================
// >>gguf
//
// The file reader. A GGUF file is, back to back and without padding:
//
//     "GGUF", u32 version, u64 n_tensors, u64 n_values
//     values:  str key, u32 type, value            (an array: u32 type, u64 count, elements)
//     tensors: str name, u32 n_dims, u64 ne[n_dims], u32 type, u64 offset into the data
//     ... up to the next multiple of `alignment`: the data
//
// with str = u64 size, bytes. Everything in it is hostile: sizes are held against the bytes left
// before they are used, and each is read once, because a mapped file may change under us. Values
// and weights stay where they lie in the file; only the tables of them are allocated, of a size
// bounded by the file's and by a constant. Names are found by binary search in a sorted list:
// n log n however they are chosen. Tensors must not overlap: what is made of them is then
// bounded by the size of the file, too.
// ==============================================================================================

enum {
    MOE__GGUF_HEADER = 24,           // bytes
    MOE__GGUF_MIN_VALUE = 14,        // bytes of the smallest value: 1 byte of key, 1 of value
    MOE__GGUF_MIN_TENSOR = 33,       // bytes of the smallest tensor description
    MOE__GGUF_MAX_ENTRIES = 1 << 20, // values of a file, tensors of a model
    MOE__GGUF_MAX_KEY = 65535,       // bytes
    MOE__GGUF_MAX_ALIGNMENT = 1 << 20,
    MOE__GGUF_MAX_PARTS = 65535,     // the writers' split.count is a u16
    MOE__GGUF_SUFFIX = 20            // strlen("-00001-of-00009.gguf")
};

// ---- the table of tensor types ---------------------------------------------------------------

// Every type that llama.cpp or ik_llama.cpp (from 133 on) give an id, in the order of ids. What
// the library knows of a type as numbers stands here, and only here. A row is
//   F(NAME, name, id, block, bytes, act, rows, meta, per, bits, offset, q, own)   floats
//   B(NAME, name, id, block, bytes, act, rows, meta, per, bits, offset, q, own)   blocks
//   K(NAME, id, block, bytes, rows, meta)   known to files, but not run
// with
//   NAME name     as in MOE_TYPE_NAME, and in the names of functions
//   block bytes   weights and bytes per block, of one row. bytes 0: the size in a file is not
//                 known (never written, or different between programs)
//   rows          rows that form a group, in which their blocks alternate: only whole groups can
//                 be addressed
//   meta          bytes of a row before its blocks: a row of n takes meta + n / block * bytes
//   act           the activations it is multiplied with, see moe__act_kind
//   per           weights per scale: 16 or 32
//   bits offset   0 <= level + offset < 2^bits, a power of 2; offset 0: there are mins
//   q             1 if there is a quantizer
//   own           1 if the vector kernels make tiles of it in a way of its own
#define MOE__ALL_TYPES(F, B, K)                                                                  \
    F(F32, f32, 0, 1, 4, F32, 1, 0, 0, 0, 0, 1, 0)                                               \
    F(F16, f16, 1, 1, 2, F32, 1, 0, 0, 0, 0, 1, 0)                                               \
    B(Q4_0, q4_0, 2, 32, 18, Q32, 1, 0, 32, 4, 8, 1, 1)                                          \
    B(Q4_1, q4_1, 3, 32, 20, Q32, 1, 0, 32, 4, 0, 1, 0)                                          \
    K(Q4_2, 4, 0, 0, 1, 0) K(Q4_3, 5, 0, 0, 1, 0)                                                \
    B(Q5_0, q5_0, 6, 32, 22, Q32, 1, 0, 32, 5, 16, 1, 1)                                         \
    B(Q5_1, q5_1, 7, 32, 24, Q32, 1, 0, 32, 5, 0, 1, 0)                                          \
    B(Q8_0, q8_0, 8, 32, 34, Q32, 1, 0, 32, 8, 128, 1, 1)                                        \
    K(Q8_1, 9, 32, 36, 1, 0)                                                                     \
    B(Q2_K, q2_k, 10, 256, 84, Q256, 1, 0, 16, 2, 0, 1, 0)                                       \
    B(Q3_K, q3_k, 11, 256, 110, Q256, 1, 0, 16, 3, 4, 1, 0)                                      \
    B(Q4_K, q4_k, 12, 256, 144, Q256, 1, 0, 32, 4, 0, 1, 1)                                      \
    B(Q5_K, q5_k, 13, 256, 176, Q256, 1, 0, 32, 5, 0, 1, 1)                                      \
    B(Q6_K, q6_k, 14, 256, 210, Q256, 1, 0, 16, 6, 32, 1, 1)                                     \
    K(Q8_K, 15, 256, 0, 1, 0)                                                                    \
    B(IQ2_XXS, iq2_xxs, 16, 256, 66, Q256, 1, 0, 32, 7, 64, 0, 0)                                \
    B(IQ2_XS, iq2_xs, 17, 256, 74, Q256, 1, 0, 16, 7, 64, 0, 0)                                  \
    B(IQ3_XXS, iq3_xxs, 18, 256, 98, Q256, 1, 0, 32, 7, 64, 0, 0)                                \
    B(IQ1_S, iq1_s, 19, 256, 50, Q256, 1, 0, 32, 5, 16, 0, 0)                                    \
    B(IQ4_NL, iq4_nl, 20, 32, 18, Q32, 1, 0, 32, 8, 128, 1, 1)                                   \
    B(IQ3_S, iq3_s, 21, 256, 110, Q256, 1, 0, 32, 5, 16, 0, 0)                                   \
    B(IQ2_S, iq2_s, 22, 256, 82, Q256, 1, 0, 16, 7, 64, 0, 0)                                    \
    B(IQ4_XS, iq4_xs, 23, 256, 136, Q256, 1, 0, 32, 8, 128, 1, 0)                                \
    K(I8, 24, 1, 1, 1, 0) K(I16, 25, 1, 2, 1, 0) K(I32, 26, 1, 4, 1, 0) K(I64, 27, 1, 8, 1, 0)   \
    K(F64, 28, 1, 8, 1, 0)                                                                       \
    B(IQ1_M, iq1_m, 29, 256, 56, Q256, 1, 0, 16, 5, 16, 0, 0)                                    \
    F(BF16, bf16, 30, 1, 2, F32, 1, 0, 0, 0, 0, 1, 0)                                            \
    K(Q4_0_4_4, 31, 32, 18, 4, 0) K(Q4_0_4_8, 32, 32, 18, 4, 0) K(Q4_0_8_8, 33, 32, 18, 8, 0)    \
    B(TQ1_0, tq1_0, 34, 256, 54, Q256, 1, 0, 32, 2, 1, 0, 0)                                     \
    B(TQ2_0, tq2_0, 35, 256, 66, Q256, 1, 0, 32, 2, 1, 0, 0)                                     \
    K(I2_S, 36, 0, 0, 1, 0) K(IQ4_NL_4_8, 37, 32, 0, 1, 0) K(IQ4_NL_8_8, 38, 32, 0, 1, 0)        \
    B(MXFP4, mxfp4, 39, 32, 17, Q32, 1, 0, 32, 5, 16, 1, 1)                                      \
    B(NVFP4, nvfp4, 40, 64, 36, Q32, 1, 0, 16, 5, 16, 0, 0)                                      \
    K(Q1_0, 41, 128, 18, 1, 0) K(Q2_0, 42, 64, 18, 1, 0) K(Q8_0_X4, 97, 32, 0, 1, 0)             \
    K(Q8_1_X4, 98, 32, 0, 1, 0) K(Q8_2_X4, 99, 32, 0, 1, 0)                                      \
    B(Q6_0, q6_0, 133, 32, 26, Q32, 1, 0, 32, 6, 32, 0, 0)                                       \
    K(IQ1_BN, 134, 64, 13, 1, 2) K(IQ2_BN, 135, 64, 16, 1, 4) K(Q8_K64, 136, 0, 0, 1, 0)         \
    B(IQ2_K, iq2_k, 137, 256, 76, Q256, 1, 0, 16, 6, 32, 0, 0)                                   \
    B(IQ3_K, iq3_k, 138, 256, 110, Q256, 1, 0, 16, 7, 64, 0, 0)                                  \
    B(IQ4_K, iq4_k, 139, 256, 144, Q256, 1, 0, 16, 8, 128, 0, 0)                                 \
    B(IQ5_K, iq5_k, 140, 256, 176, Q256, 1, 0, 16, 8, 128, 0, 0)                                 \
    B(IQ6_K, iq6_k, 141, 256, 212, Q256, 1, 0, 16, 8, 128, 0, 0)                                 \
    B(IQ4_KS, iq4_ks, 144, 256, 136, Q256, 1, 4, 32, 8, 128, 0, 0)                               \
    B(IQ2_KS, iq2_ks, 145, 256, 70, Q256, 1, 2, 32, 6, 32, 0, 0)                                 \
    K(IQ4_KSS, 146, 256, 128, 1, 4) K(Q8_K16, 147, 0, 0, 1, 0) K(Q8_K32, 148, 0, 0, 1, 0)        \
    K(Q8_KR8, 149, 0, 0, 1, 0) K(Q8_K128, 150, 0, 0, 1, 0) K(Q8_KV, 151, 32, 32, 1, 8)           \
    B(IQ5_KS, iq5_ks, 152, 256, 168, Q256, 1, 4, 32, 8, 128, 0, 0)                               \
    K(IQ2_KT, 153, 256, 68, 1, 4) K(IQ3_KT, 154, 256, 100, 1, 4) K(IQ4_KT, 155, 256, 128, 1, 4)  \
    B(IQ3_KS, iq3_ks, 156, 256, 102, Q256, 1, 2, 32, 7, 64, 0, 0)                                \
    B(IQ2_KL, iq2_kl, 157, 256, 86, Q256, 1, 2, 32, 7, 64, 0, 0)                                 \
    K(IQ1_KT, 158, 256, 56, 1, 4)                                                                \
    B(Q4_0_R8, q4_0_r8, 202, 32, 18, Q32, 8, 0, 32, 4, 8, 0, 0)                                  \
    B(Q5_0_R4, q5_0_r4, 206, 32, 22, Q32, 4, 0, 32, 5, 16, 0, 0)                                 \
    B(Q8_0_R8, q8_0_r8, 208, 32, 34, Q32, 8, 0, 32, 8, 128, 0, 0)                                \
    B(Q2_K_R4, q2_k_r4, 210, 256, 84, Q256, 4, 0, 16, 2, 0, 0, 0)                                \
    B(Q3_K_R4, q3_k_r4, 211, 256, 110, Q256, 4, 0, 16, 3, 4, 0, 0)                               \
    B(Q4_K_R4, q4_k_r4, 212, 256, 144, Q256, 4, 0, 32, 4, 0, 0, 0)                               \
    B(Q5_K_R4, q5_k_r4, 213, 256, 176, Q256, 4, 0, 32, 5, 0, 0, 0)                               \
    B(Q6_K_R4, q6_k_r4, 214, 256, 210, Q256, 4, 0, 16, 6, 32, 0, 0)                              \
    K(IQ2_XXS_R4, 216, 256, 66, 4, 0) K(IQ2_XS_R4, 217, 256, 74, 4, 0)                           \
    K(IQ3_XXS_R4, 218, 256, 98, 4, 0) K(IQ1_S_R4, 219, 32, 6, 4, 2)                              \
    B(IQ4_NL_R4, iq4_nl_r4, 220, 32, 18, Q32, 4, 0, 32, 8, 128, 0, 0)                            \
    K(IQ3_S_R4, 221, 256, 110, 4, 0) K(IQ2_S_R4, 222, 256, 82, 4, 0)                             \
    B(IQ4_XS_R8, iq4_xs_r8, 223, 256, 136, Q256, 8, 0, 32, 8, 128, 0, 0)                         \
    K(IQ1_M_R4, 229, 32, 7, 4, 2) K(BF16_R16, 230, 1, 2, 16, 0) K(Q6_0_R4, 233, 32, 26, 4, 0)    \
    K(IQ2_BN_R4, 335, 64, 16, 4, 4)                                                              \
    B(IQ2_K_R4, iq2_k_r4, 337, 256, 76, Q256, 4, 0, 16, 6, 32, 0, 0)                             \
    B(IQ3_K_R4, iq3_k_r4, 338, 256, 110, Q256, 4, 0, 16, 7, 64, 0, 0)                            \
    B(IQ4_K_R4, iq4_k_r4, 339, 256, 144, Q256, 4, 0, 16, 8, 128, 0, 0)                           \
    B(IQ5_K_R4, iq5_k_r4, 340, 256, 176, Q256, 4, 0, 16, 8, 128, 0, 0)                           \
    B(IQ4_KS_R4, iq4_ks_r4, 344, 256, 136, Q256, 4, 4, 32, 8, 128, 0, 0)                         \
    B(IQ5_KS_R4, iq5_ks_r4, 352, 256, 168, Q256, 4, 4, 32, 8, 128, 0, 0)                         \
    B(MXFP4_R8, mxfp4_r8, 353, 32, 17, Q32, 8, 0, 32, 5, 16, 0, 0)                               \
    K(Q8_K_R16, 397, 256, 258, 16, 0) K(Q8_KV_R8, 398, 32, 32, 8, 4)                             \
    K(Q8_K_R8, 399, 256, 258, 8, 0)

#define MOE__NO_TYPE(...)
#define MOE__TYPES(X) MOE__ALL_TYPES(X, X, MOE__NO_TYPE) // all that run
#define MOE__BLOCK_TYPES(X) MOE__ALL_TYPES(MOE__NO_TYPE, X, MOE__NO_TYPE)

// The ids that users know are those of the table.
#define MOE__TYPE_ID(NAME, name, id, ...) \
    MOE__STATIC_ASSERT(type_id_##name, (int)MOE_TYPE_##NAME == id);
MOE__TYPES(MOE__TYPE_ID)
#undef MOE__TYPE_ID

// What files need of a type, for all of the table.
typedef struct moe__gguf_type {
    int16_t id;
    int16_t block, bytes;
    int8_t rows, meta;
    char name[16];
} moe__gguf_type;

static const moe__gguf_type moe__gguf_types[] = {
#define MOE__GGUF_RUN(NAME, name, id, block, bytes, act, rows, meta, ...) \
    {id, block, bytes, rows, meta, #NAME},
#define MOE__GGUF_KNOWN(NAME, id, block, bytes, rows, meta) {id, block, bytes, rows, meta, #NAME},
    MOE__ALL_TYPES(MOE__GGUF_RUN, MOE__GGUF_RUN, MOE__GGUF_KNOWN)
#undef MOE__GGUF_RUN
#undef MOE__GGUF_KNOWN
};

// NULL for an unknown id.
MOE__PRIVATE const moe__gguf_type *moe__gguf_type_info(int32_t id) {
    size_t low = 0, high = sizeof moe__gguf_types / sizeof moe__gguf_types[0];
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (moe__gguf_types[middle].id == id) return &moe__gguf_types[middle];
        if (moe__gguf_types[middle].id < id) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

// ---- the object ------------------------------------------------------------------------------

// One row of a list sorted by name.
typedef struct moe__gguf_name {
    const char *data;
    uint32_t size;
    uint32_t index; // in file order
} moe__gguf_name;

typedef struct moe__gguf_entry {
    moe_gguf_tensor tensor;
    uint64_t offset; // where in its file the tensor is described
} moe__gguf_entry;

// One file.
typedef struct moe__gguf_part {
    const uint8_t *data; // the same as its moe__pages', which a memory source has not
    uint64_t size;
    uint32_t version;
    int64_t n_values, n_tensors;
    moe_gguf_value *values;
    moe__gguf_name *names; // of the values
    uint64_t alignment;
    uint64_t infos;   // offset of the first tensor description
} moe__gguf_part;

struct moe_gguf {
    moe_gguf_options options;
    moe_allocator allocator;
    char *path;             // of the part being opened; NULL for a memory source
    int32_t n_parts;
    int32_t n_parts_named;  // by the file name; only for progress
    moe__gguf_part *parts;
    moe__pages *pages;      // of each part; of a memory source all are empty
    int small_pages;        // a copy is not made of huge pages
    int looked_after;       // atomic: a model is in charge of the pages
    int64_t n_tensors;
    moe__gguf_entry *tensors;
    moe__gguf_name *names;  // of the tensors
};

// A position in a part, and what errors are to say about it. The first error stays: from then on
// everything reads as 0, so that one look at `status` behind several reads is enough.
typedef struct moe__gguf_reader {
    const moe_gguf *gguf;
    int32_t part;
    moe_status status;
    const uint8_t *data;
    uint64_t size, at;
    moe_string name; // the key or tensor that is being read, if any
    moe_error *error;
} moe__gguf_reader;

MOE__PRIVATE moe__gguf_reader moe__gguf_reader_at(const moe_gguf *gguf, int32_t part, uint64_t at,
                                                  moe_error *error) {
    moe__gguf_reader r;
    memset(&r, 0, sizeof r);
    r.gguf = gguf;
    r.part = part;
    r.data = gguf->parts[part].data;
    r.size = gguf->parts[part].size;
    r.at = at;
    r.error = error;
    return r;
}

// The part of a path that fits into moe_error.where: all of it, or else the file's name.
MOE__PRIVATE const char *moe__gguf_file_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return strlen(path) < sizeof ((moe_error *)NULL)->where || !slash ? path : slash + 1;
}

// An error at `offset` of the reader's file.
MOE__PRIVATE MOE__PRINTF(4, 5) moe_status
    moe__gguf_fail(moe__gguf_reader *r, moe_status status, uint64_t offset, const char *format,
                   ...) {
    char text[192], part[48];
    va_list args;
    if (r->status != MOE_OK) return r->status;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    part[0] = 0;
    if (r->gguf->n_parts > 1)
        snprintf(part, sizeof part, " (in part %d of %d)", (int)r->part + 1,
                 (int)r->gguf->n_parts);
    r->status = status;
    return moe__fail_at(r->error, status, offset, r->name.data, r->name.size, "%s%s", text, part);
}
#define moe__gguf_bad(r, offset, ...) moe__gguf_fail(r, MOE_ERROR_FORMAT, offset, __VA_ARGS__)

MOE__PRIVATE moe_status moe__gguf_no_memory(moe_error *error, uint64_t size) {
    return moe__fail(error, MOE_ERROR_MEMORY, "", "out of memory: %" PRIu64 " bytes are needed",
                     size);
}

// A zeroed table of n entries; NULL if n is 0 or on errors. The caller bounds n: no overflow.
MOE__PRIVATE void *moe__gguf_alloc(moe__gguf_reader *r, int64_t n, size_t size) {
    if (n == 0 || r->status != MOE_OK) return NULL;
    void *memory = moe__alloc(&r->gguf->allocator, (size_t)n * size);
    if (!memory) r->status = moe__gguf_no_memory(r->error, (uint64_t)n * size);
    return memory;
}

// ---- names -----------------------------------------------------------------------------------

// Values and tensors are found by name in tables that are sorted once. A hash table would be
// faster, but for names that an attacker has chosen it needs a secret key; this needs nothing.

MOE__INLINE int moe__gguf_name_compare(const char *a, size_t a_size, const char *b,
                                       size_t b_size) {
    int order = memcmp(a, b, a_size < b_size ? a_size : b_size);
    return order ? order : (a_size > b_size) - (a_size < b_size);
}

// Equal names stay in file order, so that the second one is blamed.
MOE__PRIVATE int moe__gguf_name_above(moe__gguf_name a, moe__gguf_name b) {
    int order = moe__gguf_name_compare(a.data, a.size, b.data, b.size);
    return order ? order > 0 : a.index > b.index;
}

// Not by what it says but by where it lies.
MOE__PRIVATE int moe__gguf_address_above(moe__gguf_name a, moe__gguf_name b) {
    return (uintptr_t)a.data != (uintptr_t)b.data ? (uintptr_t)a.data > (uintptr_t)b.data
                                                  : a.index > b.index;
}

MOE__HEAP(moe__gguf_by_name, moe__gguf_name, moe__gguf_name_above)
MOE__HEAP(moe__gguf_by_address, moe__gguf_name, moe__gguf_address_above)

// Sorts by name. Returns the index of a name that occurs a second time, or -1.
MOE__PRIVATE int64_t moe__gguf_names_sort(moe__gguf_name *names, int64_t n) {
    moe__gguf_by_name_build(names, (size_t)n); // heap sort: in place, n log n whatever they are
    moe__gguf_by_name_sort(names, (size_t)n);
    for (int64_t i = 1; i < n; i++) {
        const moe__gguf_name *a = &names[i - 1], *b = &names[i];
        if (moe__gguf_name_compare(a->data, a->size, b->data, b->size) == 0) return b->index;
    }
    return -1;
}

// Index in file order, or -1.
MOE__PRIVATE int64_t moe__gguf_names_find(const moe__gguf_name *names, int64_t n,
                                          const char *wanted) {
    size_t size = strlen(wanted);
    int64_t low = 0, high = n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        int order = moe__gguf_name_compare(names[middle].data, names[middle].size, wanted, size);
        if (order == 0) return names[middle].index;
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return -1;
}

// ---- reading ---------------------------------------------------------------------------------

// The next `size` bytes, or NULL.
MOE__PRIVATE const uint8_t *moe__gguf_take(moe__gguf_reader *r, uint64_t size, const char *what) {
    uint64_t left = r->size - r->at;
    if (size > left)
        moe__gguf_bad(r, r->at,
                      "the file ends too early: %s needs %" PRIu64 " bytes, %" PRIu64 " are left",
                      what, size, left);
    if (r->status != MOE_OK) return NULL;
    r->at += size;
    return r->data + (r->at - size);
}

MOE__PRIVATE uint32_t moe__gguf_take_u32(moe__gguf_reader *r, const char *what) {
    const uint8_t *p = moe__gguf_take(r, 4, what);
    return p ? moe__load_u32(p) : 0;
}

MOE__PRIVATE uint64_t moe__gguf_take_u64(moe__gguf_reader *r, const char *what) {
    const uint8_t *p = moe__gguf_take(r, 8, what);
    return p ? moe__load_u64(p) : 0;
}

MOE__PRIVATE moe_string moe__gguf_take_string(moe__gguf_reader *r, const char *what) {
    moe_string string;
    uint64_t size = moe__gguf_take_u64(r, what);
    string.data = (const char *)moe__gguf_take(r, size, what);
    string.size = string.data ? (size_t)size : 0;
    return string;
}

// The name of a key or tensor: not empty, below `limit` bytes, without NUL. It becomes r->name.
MOE__PRIVATE moe_status moe__gguf_take_name(moe__gguf_reader *r, const char *what, int limit) {
    uint64_t start = r->at;
    r->name.size = 0;
    r->name = moe__gguf_take_string(r, what);
    if (r->status != MOE_OK) return r->status;
    if (r->name.size == 0 || r->name.size >= (size_t)limit)
        return moe__gguf_bad(r, start, "%s has %" PRIu64 " bytes, allowed are 1 to %d", what,
                             (uint64_t)r->name.size, limit - 1);
    if (memchr(r->name.data, 0, r->name.size))
        return moe__gguf_bad(r, start, "%s has a NUL byte in it", what);
    return MOE_OK;
}

// ---- values ----------------------------------------------------------------------------------

// By moe_value_type, for messages
static const char *const moe__gguf_value_names[13] = {
    "uint8", "int8", "uint16", "int16",  "uint32", "int32",  "float32",
    "bool",  "string", "array", "uint64", "int64", "float64"};

// Bytes of a value by its type; 0: a string or array, which vary.
static const uint8_t moe__gguf_value_sizes[13] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

// Steps over `count` values of one type that is not ARRAY.
MOE__PRIVATE void moe__gguf_skip_values(moe__gguf_reader *r, uint32_t type, uint64_t count) {
    uint64_t size = moe__gguf_value_sizes[type], left = r->size - r->at;
    uint64_t smallest = size ? size : 8; // the empty string
    if (count > left / smallest) {
        moe__gguf_bad(r, r->at,
                      "the file ends too early: %" PRIu64 " values of at least %" PRIu64
                      " bytes do not fit into the %" PRIu64 " that are left",
                      count, smallest, left);
        return;
    }
    if (type == MOE_VALUE_STRING) {
        for (uint64_t i = 0; i < count && r->status == MOE_OK; i++)
            moe__gguf_take_string(r, "a string");
        return;
    }
    uint64_t start = r->at;
    const uint8_t *p = moe__gguf_take(r, count * size, "a value");
    for (uint64_t i = 0; type == MOE_VALUE_BOOL && i < count && r->status == MOE_OK; i++)
        if (p[i] > 1)
            moe__gguf_bad(r, start + i, "a bool has the value %d, allowed are 0 and 1", p[i]);
}

MOE__PRIVATE moe_status moe__gguf_read_value(moe__gguf_reader *r, moe_gguf_value *value) {
    if (moe__gguf_take_name(r, "a key", MOE__GGUF_MAX_KEY + 1) != MOE_OK) return r->status;
    value->key = r->name;
    uint32_t type = moe__gguf_take_u32(r, "a value's type"), element_type = type;
    if (type == MOE_VALUE_ARRAY) {
        element_type = moe__gguf_take_u32(r, "an array's type");
        if (element_type == MOE_VALUE_ARRAY)
            moe__gguf_bad(r, r->at - 4, "arrays of arrays are not allowed");
    }
    if (element_type > MOE_VALUE_FLOAT64)
        moe__gguf_bad(r, r->at - 4, "value type %lu does not exist", (unsigned long)element_type);
    value->count = type == MOE_VALUE_ARRAY ? moe__gguf_take_u64(r, "an array's length") : 1;
    if (r->status != MOE_OK) return r->status;
    value->type = (moe_value_type)type;
    value->element_type = (moe_value_type)element_type;
    value->offset = r->at;
    value->data = r->data + r->at;
    moe__gguf_skip_values(r, element_type, value->count);
    value->size = r->at - value->offset;
    return r->status;
}

MOE__PRIVATE moe_status moe__gguf_read_values(moe_gguf *gguf, moe__gguf_reader *r) {
    moe__gguf_part *part = &gguf->parts[r->part];
    int64_t n = part->n_values;
    part->values = (moe_gguf_value *)moe__gguf_alloc(r, n, sizeof *part->values);
    part->names = (moe__gguf_name *)moe__gguf_alloc(r, n, sizeof *part->names);
    for (int64_t i = 0; i < n; i++) {
        if (r->status != MOE_OK) return r->status;
        moe_gguf_value *value = &part->values[i];
        moe__gguf_read_value(r, value);
        part->names[i].data = value->key.data;
        part->names[i].size = (uint32_t)value->key.size;
        part->names[i].index = (uint32_t)i;
    }
    if (r->status != MOE_OK) return r->status;
    int64_t twice = moe__gguf_names_sort(part->names, n);
    if (twice < 0) return MOE_OK;
    r->name = part->values[twice].key;
    return moe__gguf_bad(r, (uint64_t)((const uint8_t *)r->name.data - r->data) - 8,
                         "the key is there twice");
}

MOE__PRIVATE const moe_gguf_value *moe__gguf_part_value(const moe__gguf_part *part,
                                                        const char *key) {
    int64_t i = moe__gguf_names_find(part->names, part->n_values, key);
    return i < 0 ? NULL : &part->values[i];
}

// An integer among the values of the reader's part, or `missing`.
MOE__PRIVATE int64_t moe__gguf_read_int(moe__gguf_reader *r, const char *key, int64_t missing) {
    int64_t out = missing;
    const moe_gguf_value *value = moe__gguf_part_value(&r->gguf->parts[r->part], key);
    if (!value) return missing;
    r->name = value->key;
    if (value->type == MOE_VALUE_ARRAY || !moe_gguf_value_int(value, 0, &out))
        moe__gguf_bad(r, value->offset, "the value must be an integer");
    return out;
}

// ---- header ----------------------------------------------------------------------------------

MOE__PRIVATE moe_status moe__gguf_read_alignment(moe__gguf_reader *r, uint64_t *out) {
    const char *key = "general.alignment";
    int64_t alignment = moe__gguf_read_int(r, key, 32);
    *out = (uint64_t)alignment;
    if (r->status != MOE_OK) return r->status;
    if (alignment >= 1 && alignment <= MOE__GGUF_MAX_ALIGNMENT && !(alignment & (alignment - 1)))
        return MOE_OK;
    return moe__gguf_bad(r, moe__gguf_part_value(&r->gguf->parts[r->part], key)->offset,
                         "the alignment %" PRId64 " is not a power of two from 1 to %d", alignment,
                         (int)MOE__GGUF_MAX_ALIGNMENT);
}

MOE__PRIVATE void moe__gguf_check_count(moe__gguf_reader *r, uint64_t offset, const char *what,
                                        uint64_t count, uint64_t smallest) {
    if (count > MOE__GGUF_MAX_ENTRIES || count > (r->size - MOE__GGUF_HEADER) / smallest)
        moe__gguf_bad(r, offset, "%" PRIu64 " %s are too many for %s", count, what,
                      count > MOE__GGUF_MAX_ENTRIES ? "this reader" : "the file");
}

// Header and values. Afterwards the counts are plausible and the alignment is known.
MOE__PRIVATE moe_status moe__gguf_read_head(moe_gguf *gguf, int32_t part_index, moe_error *error) {
    moe__gguf_part *part = &gguf->parts[part_index];
    moe__gguf_reader r = moe__gguf_reader_at(gguf, part_index, MOE__GGUF_HEADER, error);
    if (r.size < 4 || memcmp(r.data, "GGUF", 4) != 0)
        return moe__gguf_bad(&r, 0, "this is not a GGUF file");
    if (r.size < MOE__GGUF_HEADER)
        return moe__gguf_bad(&r, r.size, "the file ends within its header");
    part->version = moe__load_u32(r.data + 4);
    if (part->version && (part->version & 0xFFFF) == 0)
        return moe__gguf_fail(&r, MOE_ERROR_UNSUPPORTED, 4,
                              "the file is big-endian: convert it to little-endian");
    if (part->version != 2 && part->version != 3)
        return moe__gguf_fail(&r, MOE_ERROR_UNSUPPORTED, 4,
                              "GGUF version %lu is not supported, only 2 and 3 are",
                              (unsigned long)part->version);
    uint64_t n_tensors = moe__load_u64(r.data + 8), n_values = moe__load_u64(r.data + 16);
    moe__gguf_check_count(&r, 8, "tensors", n_tensors, MOE__GGUF_MIN_TENSOR);
    moe__gguf_check_count(&r, 16, "values", n_values, MOE__GGUF_MIN_VALUE);
    if (r.status != MOE_OK) return r.status;
    part->n_values = (int64_t)n_values;
    part->n_tensors = (int64_t)n_tensors;
    if (moe__gguf_read_values(gguf, &r) != MOE_OK) return r.status;
    part->infos = r.at;
    return moe__gguf_read_alignment(&r, &part->alignment);
}

// ---- tensors ---------------------------------------------------------------------------------

// The bytes of a tensor, and whether its shape suits its type. 0 bytes if the size is unknown.
MOE__PRIVATE moe_status moe__gguf_tensor_size(moe__gguf_reader *r, uint64_t offset,
                                              moe_gguf_tensor *tensor) {
    const moe__gguf_type *type = moe__gguf_type_info((int32_t)tensor->type);
    const int64_t *ne = tensor->ne;
    uint64_t size;
    if (!type || type->bytes == 0) return MOE_OK;
    if (ne[0] % type->block)
        return moe__gguf_bad(r, offset,
                             "rows of %" PRId64 " weights cannot be cut into %s blocks of %d",
                             ne[0], type->name, type->block);
    if (ne[1] % type->rows)
        return moe__gguf_bad(r, offset, "%" PRId64 " rows cannot be cut into %s groups of %d",
                             ne[1], type->name, type->rows);
    if (type->rows > 1 && strcmp(tensor->name, "token_embd.weight") == 0)
        return moe__gguf_bad(r, offset,
                             "type %s interleaves rows, but this tensor is read row by row",
                             type->name);
    if (!moe__size_mul((uint64_t)(ne[0] / type->block), (uint64_t)type->bytes, &size) ||
        !moe__size_add(size, (uint64_t)type->meta, &size) ||
        !moe__size_mul(size, (uint64_t)ne[1], &size) ||
        !moe__size_mul(size, (uint64_t)ne[2], &size) ||
        !moe__size_mul(size, (uint64_t)ne[3], &size) || size > INT64_MAX)
        return moe__gguf_bad(r, offset, "the tensor's size is out of bounds");
    tensor->size = size;
    return MOE_OK;
}

// Shape: every length at least 1, their product within int64_t.
MOE__PRIVATE moe_status moe__gguf_read_shape(moe__gguf_reader *r, moe_gguf_tensor *tensor) {
    uint64_t count = 1;
    uint32_t n_dims = moe__gguf_take_u32(r, "a tensor's description");
    if (n_dims < 1 || n_dims > 4)
        moe__gguf_bad(r, r->at - 4, "a tensor has %lu dimensions, allowed are 1 to 4",
                      (unsigned long)n_dims);
    tensor->n_dims = (int32_t)n_dims;
    for (uint32_t i = 0; i < 4 && r->status == MOE_OK; i++) {
        uint64_t length = i < n_dims ? moe__gguf_take_u64(r, "a tensor's description") : 1;
        if (length < 1 || !moe__size_mul(count, length, &count) || count > INT64_MAX)
            moe__gguf_bad(r, r->at - 8, "dimension %d of the tensor, %" PRIu64
                          ", is out of bounds", (int)i, length);
        tensor->ne[i] = (int64_t)length;
    }
    return r->status;
}

// One tensor's description. Its offset stays relative to the data, whose start is not known yet.
MOE__PRIVATE moe_status moe__gguf_read_tensor(moe__gguf_reader *r, moe__gguf_entry *entry) {
    moe_gguf_tensor *tensor = &entry->tensor;
    entry->offset = r->at;
    moe__gguf_take_name(r, "a tensor's name", sizeof tensor->name);
    if (r->status != MOE_OK) return r->status;
    memcpy(tensor->name, r->name.data, r->name.size);
    tensor->part = r->part;
    moe__gguf_read_shape(r, tensor);
    uint32_t type = moe__gguf_take_u32(r, "a tensor's description");
    tensor->offset = moe__gguf_take_u64(r, "a tensor's description");
    if (type > INT32_MAX)
        moe__gguf_bad(r, r->at - 12, "tensor type %lu cannot exist", (unsigned long)type);
    if (tensor->offset % r->gguf->parts[r->part].alignment)
        moe__gguf_bad(r, r->at - 8,
                      "the tensor's offset %" PRIu64 " is not a multiple of the alignment",
                      tensor->offset);
    if (r->status != MOE_OK) return r->status;
    tensor->type = (moe_type)type;
    return moe__gguf_tensor_size(r, entry->offset, tensor);
}

// Where the tensor lies, now that the start of the data is known.
MOE__PRIVATE void moe__gguf_locate_tensor(moe__gguf_reader *r, uint64_t start,
                                         moe__gguf_entry *entry) {
    moe_gguf_tensor *tensor = &entry->tensor;
    uint64_t end;
    if (moe__size_add(start, tensor->offset, &tensor->offset) &&
        moe__size_add(tensor->offset, tensor->size, &end) && end <= r->size) {
        if (tensor->size) tensor->data = r->data + tensor->offset;
        return;
    }
    r->name.data = tensor->name;
    r->name.size = strlen(tensor->name);
    moe__gguf_bad(r, entry->offset,
                  "the tensor's data, %" PRIu64 " bytes, ends behind the end of the file",
                  tensor->size);
}

// All tensors of a part, appended to the model's table.
MOE__PRIVATE moe_status moe__gguf_read_tensors(moe_gguf *gguf, int32_t part_index,
                                               moe_error *error) {
    const moe__gguf_part *part = &gguf->parts[part_index];
    moe__gguf_reader r = moe__gguf_reader_at(gguf, part_index, part->infos, error);
    int64_t first = gguf->n_tensors, end = first + part->n_tensors;
    for (int64_t i = first; i < end && r.status == MOE_OK; i++)
        moe__gguf_read_tensor(&r, &gguf->tensors[i]);
    uint64_t start = (r.at + part->alignment - 1) & ~(part->alignment - 1);
    for (int64_t i = first; i < end && r.status == MOE_OK; i++)
        moe__gguf_locate_tensor(&r, start, &gguf->tensors[i]);
    gguf->n_tensors = end;
    return r.status;
}

// An error about a tensor as it is described.
MOE__PRIVATE moe_status moe__gguf_bad_tensor(const moe_gguf *gguf, int64_t index,
                                             const char *text, const char *other,
                                             moe_error *error) {
    const moe__gguf_entry *entry = &gguf->tensors[index];
    moe__gguf_reader r = moe__gguf_reader_at(gguf, entry->tensor.part, 0, error);
    r.name.data = entry->tensor.name;
    r.name.size = strlen(entry->tensor.name);
    return moe__gguf_bad(&r, entry->offset, "%s%s", text, other);
}

// No byte may belong to two tensors. (Those of unknown size have no data.)
MOE__PRIVATE moe_status moe__gguf_check_overlap(const moe_gguf *gguf, moe_error *error) {
    moe__gguf_reader r = moe__gguf_reader_at(gguf, 0, 0, error);
    const int64_t n = gguf->n_tensors;
    moe__gguf_name *order = (moe__gguf_name *)moe__gguf_alloc(&r, n, sizeof *order);
    for (int64_t i = 0; i < n && order; i++) {
        order[i].data = (const char *)gguf->tensors[i].tensor.data;
        order[i].index = (uint32_t)i;
    }
    if (order) moe__gguf_by_address_build(order, (size_t)n);
    if (order) moe__gguf_by_address_sort(order, (size_t)n);
    for (int64_t i = 1; i < n && r.status == MOE_OK; i++) {
        const moe_gguf_tensor *before = &gguf->tensors[order[i - 1].index].tensor;
        const moe_gguf_tensor *tensor = &gguf->tensors[order[i].index].tensor;
        if (before->data && (uintptr_t)tensor->data - (uintptr_t)before->data < before->size)
            r.status = moe__gguf_bad_tensor(gguf, order[i].index,
                                            "the tensor's data overlaps that of ", before->name,
                                            error);
    }
    moe__free(&gguf->allocator, order);
    return r.status;
}

MOE__PRIVATE moe_status moe__gguf_read_all_tensors(moe_gguf *gguf, moe_error *error) {
    moe__gguf_reader r = moe__gguf_reader_at(gguf, 0, 0, error);
    int64_t n = 0;
    for (int32_t p = 0; p < gguf->n_parts; p++) n += gguf->parts[p].n_tensors;
    if (n > MOE__GGUF_MAX_ENTRIES)
        return moe__fail(error, MOE_ERROR_FORMAT, "",
                         "%" PRId64 " tensors are too many for this reader", n);
    gguf->tensors = (moe__gguf_entry *)moe__gguf_alloc(&r, n, sizeof *gguf->tensors);
    gguf->names = (moe__gguf_name *)moe__gguf_alloc(&r, n, sizeof *gguf->names);
    for (int32_t p = 0; p < gguf->n_parts && r.status == MOE_OK; p++)
        r.status = moe__gguf_read_tensors(gguf, p, error);
    if (r.status != MOE_OK) return r.status;
    for (int64_t i = 0; i < n; i++) {
        gguf->names[i].data = gguf->tensors[i].tensor.name;
        gguf->names[i].size = (uint32_t)strlen(gguf->names[i].data);
        gguf->names[i].index = (uint32_t)i;
    }
    int64_t twice = moe__gguf_names_sort(gguf->names, n);
    if (twice >= 0)
        return moe__gguf_bad_tensor(gguf, twice, "the tensor is there twice", "", error);
    return moe__gguf_check_overlap(gguf, error);
}

// ---- files -----------------------------------------------------------------------------------

MOE__PRIVATE moe_status moe__gguf_io_fail(moe_error *error, const char *path, const char *what,
                                          int code) {
    const char *why = moe__errno_words(code);
    const char *name = moe__gguf_file_name(path);
    if (why) return moe__fail(error, MOE_ERROR_IO, name, "cannot %s the file: %s", what, why);
    return moe__fail(error, MOE_ERROR_IO, name, "cannot %s the file: system error %d", what, code);
}

// Opens a regular file. O_NONBLOCK: opening a FIFO must not wait for somebody to write into it.
MOE__PRIVATE moe_status moe__gguf_open_file(const char *path, int *file, uint64_t *size,
                                            moe_error *error) {
    struct stat info;
    const char *name = moe__gguf_file_name(path);
    *file = open(path, O_RDONLY | O_NONBLOCK | MOE__O_CLOEXEC);
    if (*file < 0) return moe__gguf_io_fail(error, path, "open", errno);
    if (fstat(*file, &info) != 0) return moe__gguf_io_fail(error, path, "examine", errno);
    if (S_ISDIR(info.st_mode)) return moe__gguf_io_fail(error, path, "read", EISDIR);
    if (!S_ISREG(info.st_mode))
        return moe__fail(error, MOE_ERROR_IO, name, "cannot read the file: not a regular file");
    if (info.st_size <= 0) return moe__fail(error, MOE_ERROR_FORMAT, name, "the file is empty");
    *size = (uint64_t)info.st_size;
    if (*size > SIZE_MAX / 4)
        return moe__fail(error, MOE_ERROR_IO, name, "the file is too large for this machine");
    return MOE_OK;
}

MOE__PRIVATE moe_status moe__gguf_progress(const moe_gguf *gguf, int32_t part, uint64_t done,
                                           uint64_t size, moe_error *error) {
    if (!gguf->options.progress) return MOE_OK;
    double fraction = ((double)part + (double)done / (double)size) / gguf->n_parts_named;
    if (gguf->options.progress(gguf->options.progress_user, (float)fraction)) return MOE_OK;
    return moe__fail(error, MOE_ERROR_CANCELLED, moe__gguf_file_name(gguf->path),
                     "loading was cancelled by the progress callback");
}

// What a team that reads or touches a part reports to.
typedef struct moe__gguf_loading {
    const moe_gguf *gguf;
    int32_t part;
    uint64_t size;
    moe_error *error;
} moe__gguf_loading;

MOE__PRIVATE int moe__gguf_report(void *user, uint64_t done) {
    const moe__gguf_loading *l = (const moe__gguf_loading *)user;
    return moe__gguf_progress(l->gguf, l->part, done, l->size, l->error) ? ECANCELED : 0;
}

// Maps or reads the file, as the options say. *kept: it stays open.
MOE__PRIVATE moe_status moe__gguf_load_file(moe_gguf *gguf, int32_t part_index, int file,
                                            int *kept, moe_error *error) {
    moe__gguf_part *part = &gguf->parts[part_index];
    moe__pages *pages = &gguf->pages[part_index];
    moe__gguf_loading loading = {gguf, part_index, part->size, error};
    moe__pages_load load = {pages, file, gguf->options.progress ? moe__gguf_report : NULL,
                            &loading};
    const int copy = gguf->options.pages == MOE_PAGES_COPY;
    const int keep = gguf->options.pages == MOE_PAGES_AUTO;
    int code = copy ? moe__pages_copy(&load, part->size, gguf->small_pages, &gguf->allocator)
                    : moe__pages_map(pages, file, part->size, keep);
    *kept = !code && keep;
    part->data = pages->data;
    if (!code && !copy && gguf->options.prefault == MOE_ON)
        code = moe__pages_load_run(&load, &gguf->allocator, moe__pages_touch_chunk);
    if (code == ECANCELED) return MOE_ERROR_CANCELLED; // moe__gguf_progress said so
    if (code == -1)
        return moe__fail(error, MOE_ERROR_IO, moe__gguf_file_name(gguf->path),
                         "the file became shorter while it was read");
    if (code == ENOMEM && copy) return moe__gguf_no_memory(error, part->size);
    return code ? moe__gguf_io_fail(error, gguf->path, copy ? "read" : "map", code) : MOE_OK;
}

// gguf->path becomes the data of a part.
MOE__PRIVATE moe_status moe__gguf_load_part(moe_gguf *gguf, int32_t part_index, moe_error *error) {
    int file = -1, kept = 0;
    moe_status status =
        moe__gguf_open_file(gguf->path, &file, &gguf->parts[part_index].size, error);
    if (status == MOE_OK) status = moe__gguf_load_file(gguf, part_index, file, &kept, error);
    if (file >= 0 && !kept) close(file);
    return status;
}

// ---- split models ----------------------------------------------------------------------------

// Large models come as several files, NAME-00001-of-0000n.gguf and so on. Each is a GGUF file with
// keys of its own: split.no (from 0), split.count and split.tensors.count (of all parts). The
// model's other values are in the first part, its tensors in any.

// Number n of the file name NAME-00001-of-0000n.gguf, else 1.
MOE__PRIVATE int32_t moe__gguf_named_parts(const char *path) {
    size_t size = strlen(path);
    if (size <= MOE__GGUF_SUFFIX) return 1;
    const char *suffix = path + size - MOE__GGUF_SUFFIX;
    if (memcmp(suffix, "-00001-of-", 10) != 0 || strcmp(suffix + 15, ".gguf") != 0) return 1;
    int32_t n = 0;
    for (int i = 10; i < 15; i++) {
        if (suffix[i] < '0' || suffix[i] > '9') return 1;
        n = n * 10 + (suffix[i] - '0');
    }
    return n > 0 ? n : 1;
}

// split.no and split.count of a part must be what the first part makes expect.
MOE__PRIVATE moe_status moe__gguf_check_split(const moe_gguf *gguf, int32_t part, int64_t count,
                                              moe_error *error) {
    moe__gguf_reader r = moe__gguf_reader_at(gguf, part, 0, error);
    int64_t own_no = moe__gguf_read_int(&r, "split.no", -1);
    int64_t own_count = moe__gguf_read_int(&r, "split.count", -1);
    const char *name = moe__gguf_file_name(gguf->path);
    if (r.status != MOE_OK) return r.status;
    if (own_count != count)
        return moe__fail(error, MOE_ERROR_FORMAT, name,
                         "split.count is %" PRId64 " in this file and %" PRId64 " in the first",
                         own_count, count);
    if (own_no != part && part == 0)
        return moe__fail(error, MOE_ERROR_FORMAT, name,
                         "split.no is %" PRId64 ": open the first part of the model", own_no);
    if (own_no != part)
        return moe__fail(error, MOE_ERROR_FORMAT, name,
                         "split.no is %" PRId64 " instead of %d: this is another part", own_no,
                         (int)part);
    return MOE_OK;
}

// Room for `count` parts, of which the first is there.
MOE__PRIVATE moe_status moe__gguf_grow_parts(moe_gguf *gguf, int32_t count, moe_error *error) {
    moe__gguf_reader r = moe__gguf_reader_at(gguf, 0, 0, error);
    moe__gguf_part *parts = (moe__gguf_part *)moe__gguf_alloc(&r, count, sizeof *parts);
    moe__pages *pages = (moe__pages *)moe__gguf_alloc(&r, count, sizeof *pages);
    if (!pages) {
        moe__free(&gguf->allocator, parts);
        return r.status;
    }
    parts[0] = gguf->parts[0];
    pages[0] = gguf->pages[0];
    moe__free(&gguf->allocator, gguf->parts);
    moe__free(&gguf->allocator, gguf->pages);
    gguf->parts = parts;
    gguf->pages = pages;
    gguf->n_parts = count;
    return MOE_OK;
}

// Whether the first part may be part 0 of `count` parts.
MOE__PRIVATE moe_status moe__gguf_check_first(const moe_gguf *gguf, int64_t count,
                                              moe_error *error) {
    if (count < 0 || count > MOE__GGUF_MAX_PARTS)
        return moe__fail(error, MOE_ERROR_FORMAT, "split.count",
                         "a model cannot be split into %" PRId64 " parts", count);
    if (!gguf->path)
        return moe__fail(error, MOE_ERROR_UNSUPPORTED, "split.count",
                         "one part of a split model cannot be opened from memory");
    moe_status status = moe__gguf_check_split(gguf, 0, count, error);
    if (status != MOE_OK) return status;
    if (moe__gguf_named_parts(gguf->path) != count)
        return moe__fail(error, MOE_ERROR_FORMAT, moe__gguf_file_name(gguf->path),
                         "the first of %d parts must be named like NAME-00001-of-%05d.gguf",
                         (int)count, (int)count);
    return MOE_OK;
}

// Opens the other files of a split model, if it is one.
MOE__PRIVATE moe_status moe__gguf_load_other_parts(moe_gguf *gguf, moe_error *error) {
    moe__gguf_reader r = moe__gguf_reader_at(gguf, 0, 0, error);
    int64_t count = moe__gguf_read_int(&r, "split.count", 1);
    if (r.status != MOE_OK || count == 0 || count == 1) return r.status;
    moe_status status = moe__gguf_check_first(gguf, count, error);
    if (status != MOE_OK) return status;
    int64_t n_tensors = moe__gguf_read_int(&r, "split.tensors.count", -1);
    int64_t sum = gguf->parts[0].n_tensors;
    if (r.status != MOE_OK) return r.status;
    status = moe__gguf_grow_parts(gguf, (int32_t)count, error);
    for (int32_t p = 1; status == MOE_OK && p < count; p++) {
        snprintf(gguf->path + strlen(gguf->path) - MOE__GGUF_SUFFIX, MOE__GGUF_SUFFIX + 1,
                 "-%05u-of-%05u.gguf", (unsigned)(p + 1) % 100000, (unsigned)count % 100000);
        status = moe__gguf_load_part(gguf, p, error);
        if (status == MOE_OK) status = moe__gguf_read_head(gguf, p, error);
        if (status == MOE_OK) status = moe__gguf_check_split(gguf, p, count, error);
        sum += gguf->parts[p].n_tensors;
    }
    if (status == MOE_OK && n_tensors >= 0 && n_tensors != sum)
        return moe__fail(error, MOE_ERROR_FORMAT, "split.tensors.count",
                         "the parts hold %" PRId64 " tensors together, %" PRId64 " are announced",
                         sum, n_tensors);
    return status;
}

// ---- opening and closing ---------------------------------------------------------------------

// An empty object with one part.
MOE__PRIVATE moe_status moe__gguf_new(const moe_gguf_options *options, moe_gguf **out,
                                      moe_error *error) {
    moe_allocator allocator;
    moe_gguf_options all;
    memset(&all, 0, sizeof all);
    if (options) all = *options;
    if (!moe__is_switch(all.prefault))
        return moe__fail(error, MOE_ERROR_ARGUMENT, "prefault",
                         "a switch must be MOE_ON, MOE_OFF or 0");
    if ((unsigned)all.pages > MOE_PAGES_COPY)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "pages", "pages is %d, not 0..%d",
                         (int)all.pages, (int)MOE_PAGES_COPY);
    moe_status status = moe__allocator_init(&allocator, &all.allocator, error);
    if (status != MOE_OK) return status;
    moe_gguf *gguf = (moe_gguf *)moe__alloc(&allocator, sizeof *gguf);
    if (!gguf) return moe__gguf_no_memory(error, sizeof *gguf);
    gguf->options = all;
    gguf->allocator = allocator;
    gguf->n_parts = gguf->n_parts_named = 1;
    *out = gguf;
    gguf->parts = (moe__gguf_part *)moe__alloc(&allocator, sizeof *gguf->parts);
    gguf->pages = (moe__pages *)moe__alloc(&allocator, sizeof *gguf->pages);
    if (gguf->parts && gguf->pages) return MOE_OK;
    return moe__gguf_no_memory(error, sizeof *gguf->parts);
}

// Takes objects in any state of being built.
MOE_API void moe_gguf_close(moe_gguf *gguf) {
    if (!gguf) return;
    moe_allocator allocator = gguf->allocator;
    for (int32_t p = 0; gguf->parts && p < gguf->n_parts; p++) {
        moe__gguf_part *part = &gguf->parts[p];
        if (gguf->pages) moe__pages_close(&gguf->pages[p]);
        moe__free(&allocator, part->values);
        moe__free(&allocator, part->names);
    }
    moe__free(&allocator, gguf->parts);
    moe__free(&allocator, gguf->pages);
    moe__free(&allocator, gguf->tensors);
    moe__free(&allocator, gguf->names);
    moe__free(&allocator, gguf->path);
    moe__free(&allocator, gguf);
}

// The second half of opening: part 0 has its data, if that went well. NULL after an error.
MOE__PRIVATE moe_gguf *moe__gguf_finish(moe_gguf *gguf, moe_status status, moe_error *error) {
    if (status == MOE_OK) status = moe__gguf_read_head(gguf, 0, error);
    if (status == MOE_OK) status = moe__gguf_load_other_parts(gguf, error);
    if (status == MOE_OK) status = moe__gguf_read_all_tensors(gguf, error);
    if (status == MOE_OK) return gguf;
    moe_gguf_close(gguf);
    return NULL;
}

// As moe_gguf_open; small: a copy is not made of huge pages.
MOE__PRIVATE moe_gguf *moe__gguf_open(const char *path, const moe_gguf_options *options, int small,
                                      moe_error *error) {
    moe_gguf *gguf = NULL;
    if (!path || !*path) {
        moe__fail(error, MOE_ERROR_ARGUMENT, "path", "path is missing");
        return NULL;
    }
    moe_status status = moe__gguf_new(options, &gguf, error);
    if (status == MOE_OK) {
        gguf->path = (char *)moe__alloc(&gguf->allocator, strlen(path) + 1);
        if (!gguf->path) status = moe__gguf_no_memory(error, strlen(path) + 1);
    }
    if (status == MOE_OK) {
        memcpy(gguf->path, path, strlen(path));
        gguf->small_pages = small;
        gguf->n_parts_named = moe__gguf_named_parts(path);
        status = moe__gguf_load_part(gguf, 0, error);
    }
    return moe__gguf_finish(gguf, status, error);
}

MOE_API moe_gguf *moe_gguf_open(const char *path, const moe_gguf_options *options,
                                moe_error *error) {
    return moe__gguf_open(path, options, 0, error);
}

MOE_API moe_gguf *moe_gguf_open_memory(const void *data, size_t size,
                                       const moe_gguf_options *options, moe_error *error) {
    moe_gguf *gguf = NULL;
    if (!data) {
        moe__fail(error, MOE_ERROR_ARGUMENT, "data", "data is NULL");
        return NULL;
    }
    moe_status status = moe__gguf_new(options, &gguf, error);
    if (status == MOE_OK) {
        gguf->parts[0].data = (const uint8_t *)data;
        gguf->parts[0].size = size;
    }
    return moe__gguf_finish(gguf, status, error);
}

// ---- what is inside --------------------------------------------------------------------------

MOE_API uint32_t moe_gguf_version(const moe_gguf *gguf) {
    return gguf ? gguf->parts[0].version : 0;
}

MOE_API uint64_t moe_gguf_file_size(const moe_gguf *gguf) {
    uint64_t sum = 0;
    for (int32_t p = 0; gguf && p < gguf->n_parts; p++) sum += gguf->parts[p].size;
    return sum;
}

MOE_API int64_t moe_gguf_n_values(const moe_gguf *gguf) {
    return gguf ? gguf->parts[0].n_values : 0;
}

MOE_API int64_t moe_gguf_n_tensors(const moe_gguf *gguf) { return gguf ? gguf->n_tensors : 0; }

MOE_API const moe_gguf_value *moe_gguf_value_at(const moe_gguf *gguf, int64_t i) {
    return i >= 0 && i < moe_gguf_n_values(gguf) ? &gguf->parts[0].values[i] : NULL;
}

MOE_API const moe_gguf_tensor *moe_gguf_tensor_at(const moe_gguf *gguf, int64_t i) {
    return i >= 0 && i < moe_gguf_n_tensors(gguf) ? &gguf->tensors[i].tensor : NULL;
}

MOE_API const moe_gguf_value *moe_gguf_find_value(const moe_gguf *gguf, const char *key) {
    return gguf && key ? moe__gguf_part_value(&gguf->parts[0], key) : NULL;
}

MOE_API const moe_gguf_tensor *moe_gguf_find_tensor(const moe_gguf *gguf, const char *name) {
    if (!gguf || !name) return NULL;
    return moe_gguf_tensor_at(gguf, moe__gguf_names_find(gguf->names, gguf->n_tensors, name));
}

// Address of element i, or NULL; strings have none.
MOE__PRIVATE const uint8_t *moe__gguf_element(const moe_gguf_value *value, uint64_t i) {
    if (!value || !value->data || (unsigned)value->element_type > MOE_VALUE_FLOAT64) return NULL;
    uint64_t size = moe__gguf_value_sizes[value->element_type];
    if (size == 0 || i >= value->size / size) return NULL;
    return (const uint8_t *)value->data + i * size;
}

MOE_API int moe_gguf_value_int(const moe_gguf_value *value, uint64_t i, int64_t *out) {
    const uint8_t *p = moe__gguf_element(value, i);
    if (!p || !out) return 0;
    switch (value->element_type) {
    case MOE_VALUE_BOOL:
    case MOE_VALUE_UINT8: *out = *p; return 1;
    case MOE_VALUE_INT8: *out = (int8_t)*p; return 1;
    case MOE_VALUE_UINT16: *out = moe__load_u16(p); return 1;
    case MOE_VALUE_INT16: *out = (int16_t)moe__load_u16(p); return 1;
    case MOE_VALUE_UINT32: *out = moe__load_u32(p); return 1;
    case MOE_VALUE_INT32: *out = (int32_t)moe__load_u32(p); return 1;
    case MOE_VALUE_INT64: *out = (int64_t)moe__load_u64(p); return 1;
    case MOE_VALUE_UINT64:
        if (moe__load_u64(p) > INT64_MAX) return 0;
        *out = (int64_t)moe__load_u64(p);
        return 1;
    default: return 0;
    }
}

MOE_API int moe_gguf_value_float(const moe_gguf_value *value, uint64_t i, double *out) {
    const uint8_t *p = moe__gguf_element(value, i);
    int64_t integer;
    if (!p || !out || value->element_type == MOE_VALUE_BOOL) return 0;
    if (value->element_type == MOE_VALUE_FLOAT32) *out = moe__load_f32(p);
    else if (value->element_type == MOE_VALUE_FLOAT64) memcpy(out, p, sizeof *out);
    else if (value->element_type == MOE_VALUE_UINT64) *out = (double)moe__load_u64(p);
    else if (moe_gguf_value_int(value, i, &integer)) *out = (double)integer;
    else return 0;
    return 1;
}

MOE_API int moe_gguf_value_bool(const moe_gguf_value *value, uint64_t i, int *out) {
    int64_t integer;
    if (!out || !moe_gguf_value_int(value, i, &integer) || integer < 0 || integer > 1) return 0;
    *out = (int)integer;
    return 1;
}

MOE_API int moe_gguf_value_string(const moe_gguf_value *value, const void **cursor,
                                  moe_string *out) {
    if (!value || !value->data || !cursor || !out || value->element_type != MOE_VALUE_STRING)
        return 0;
    // Sizes were checked when the file was opened, but a mapped file may have changed since.
    const uint8_t *start = (const uint8_t *)value->data;
    uint64_t at = *cursor ? (uint64_t)((uintptr_t)*cursor - (uintptr_t)start) : 0;
    if (at > value->size || value->size - at < 8) return 0;
    uint64_t size = moe__load_u64(start + at);
    if (size > value->size - at - 8) return 0;
    out->data = (const char *)start + at + 8;
    out->size = (size_t)size;
    *cursor = start + at + 8 + size;
    return 1;
}

// ==============================================================================================
// >>types
//
// Tensor types: what the bits of each mean, how to make them (quantize), and the plain C product
// that every vector kernel is held against. Blocks are read by byte offset with memcpy: rows may
// lie at any address.
//
//     row of a matrix   block | block | block | ...   each: scales, then small integers
//     activations       record          | record      int8 and their scales, made from floats
//                                                     before they are multiplied
//
// ONE ARITHMETIC. Behind their bits all block types are the same:
//
//     weight = d * scale * level - dmin * min
//
// d and dmin are floats of the block (of the row in types with `meta`). scale and min are small
// integers for each 16 or 32 weights, 1 in blocks of 32. level is an int8 for each weight. Types
// differ in how these are stored:
//
//     even levels      a number of 2 to 8 bits less an offset                      Q4_0, Q6_K
//     with mins        no offset, but a min to subtract                            Q4_K, Q5_1
//     table            the number is an index into 4 to 64 levels                  IQ4_NL, MXFP4
//     two tables       the second is the first plus a constant, the shift; a bit
//                      of each 16 or 32 weights chooses                            IQ4_K, IQ2_KS
//     ternary          levels -1, 0, 1, five in a byte or four                     TQ1_0, TQ2_0
//     code book        one index for 4 or 8 levels at once, and their signs        IQ2_XS, IQ3_S
//     interleaved      blocks of 4 or 8 rows in one, so that a vector of weights
//                      belongs to several rows (_R4, _R8)                          Q4_K_R4
//
// Activations are quantized to int8 with one scale per 32 values or per 256, as the type wants.
// The product of a row and a vector is then exact integers inside a scale, floats between them,
// in one order for all kernels: see "the product of quantized rows".
//
// TO ADD A TYPE, all places (tests/test_types.c holds the list against two types):
//
//   1. moe_type                              its id in files (>>api)
//   2. MOE__ALL_TYPES                        its row: sizes, scales, bits (>>gguf)
//   3. MOE__LAYOUT_NAME                      what its bits mean, in words; a word that there is
//                                            none of is written here and once more for vectors
// and if it has 32 weights per block: its product, which reads all blocks of a record at once
//   4. MOE__DOT_Q32 q32_scales q32_unpack    and q32_table if it has levels of its own (>>kernels)
// and if it has a quantizer (column q): the first two, or one of its own as the third
//   5. MOE__TYPES_QUANTIZE moe__types_pack_NAME moe__quantize_NAME
// and if it has a way of its own to become tiles (column own)
//   6. MOE__TILE_TYPE MOE__TILE_NIBBLES tile_unpack_nibbles                         (>>kernels)
//
// Tests, benches and the rest of the library walk the table.
// ==============================================================================================

enum {
#define MOE__TYPE_INDEX(NAME, ...) MOE__INDEX_##NAME,
    MOE__TYPES(MOE__TYPE_INDEX)
#undef MOE__TYPE_INDEX
    MOE__N_TYPES,
    MOE__GROUP_ROWS = 8 // most rows that a type interleaves
};
// The columns of the table as constants: MOE__BYTES_Q4_0, ...
enum {
#define MOE__TYPE_COLUMNS(NAME, name, id, block, bytes, act, rows, meta, per, bits, offset, ...)  \
    MOE__BLOCK_##NAME = block, MOE__BYTES_##NAME = bytes, MOE__ROWS_##NAME = rows,                \
    MOE__META_##NAME = meta, MOE__PER_##NAME = per, MOE__BITS_##NAME = bits,                      \
    MOE__OFFSET_##NAME = offset,
    MOE__TYPES(MOE__TYPE_COLUMNS)
#undef MOE__TYPE_COLUMNS
    MOE__COLUMNS_END // the list ends with a comma, which C++ does not like at the end
};

// ---- activations -----------------------------------------------------------------------------

// A matrix of quantized weights is multiplied with activations quantized to int8, in records of
// 256 values. The last record of a row may be partly filled (rows of 1408 or 2880 values); the
// rest of it is zero.
typedef enum moe__act_kind {
    MOE__ACT_F32,  // plain floats, for F32 F16 BF16
    MOE__ACT_Q32,  // moe__act32: one scale per 32 values, for types with blocks of 32
    MOE__ACT_Q256, // moe__act256: one scale per 256 values, for types with blocks of 256
    MOE__ACT_KINDS
} moe__act_kind;

// d = max |x| / 127 (f32, never rounded to f16), q = x * (127 / max |x|) to the nearest even
// integer: the same bits from every instruction set. max |x| < 2^-120 (127 / max |x| would not
// be finite): d = 0, q = 0. NaN or infinity among the values: d = NaN (bits 0x7FC00000), q = 0.
// Vectors multiply unsigned bytes, level + offset, with q. The offset is taken off again by
// sum(level * q) = sum((level + offset) * q) - offset * sum(q): sums of q are stored negated and
// as int32, so that an accumulator may start at nsum * offset instead of 0.
typedef struct moe__act32 {
    int8_t q[256];   // value i is at moe__act32_at(i)
    int32_t nsum[8]; // minus the sum of each 32 values
    float d[8];      // scale of each 32 values
} moe__act32;

// In moe__act32 the even blocks of 32 values lie before the odd ones, and of both the values
// 0-15 of each block before the values 16-31: many types pack their weights so, and a vector
// then holds parts of several blocks, which can be picked out of 128 bytes.
MOE__INLINE int moe__act32_at(int i) {
    const unsigned u = (unsigned)i; // dividing is shifting
    return (int)(u / 32 % 2 * 128 + u % 32 / 16 * 64 + u / 64 * 16 + u % 16);
}

// In moe__act256 each four sub-blocks of 32 values lie in the order 0 2 1 3: a vector of 64
// bytes of Q4_K holds weights of sub-blocks 0 and 2 in its low nibbles, of 1 and 3 in the high
// ones.
MOE__INLINE int moe__act256_at(int i) {
    const unsigned u = (unsigned)i;
    return (int)(u / 128 * 128 + (u / 32 % 2 * 2 + u / 64 % 2) * 32 + u % 32);
}

typedef struct moe__act256 {
    int8_t q[256];     // value i is at moe__act256_at(i)
    int32_t nsum[16];  // minus the sum of each 16 values
    int16_t sum16[16]; // the sum of each 16 values
    int16_t sum32[8];  // the sum of each 32 values
    float d;
    float pad[3];
} moe__act256;
MOE__STATIC_ASSERT(act32_size, sizeof(moe__act32) == 320);
MOE__STATIC_ASSERT(act256_size, sizeof(moe__act256) == 384);

// Bytes of n activations.
MOE__INLINE size_t moe__act_size(moe__act_kind kind, int64_t n) {
    size_t records = (size_t)((n + 255) / 256);
    if (kind == MOE__ACT_Q32) return records * sizeof(moe__act32);
    if (kind == MOE__ACT_Q256) return records * sizeof(moe__act256);
    return (size_t)n * sizeof(float);
}

// ---- code books ------------------------------------------------------------------------------

// The IQ1, IQ2 and IQ3 types store groups of 8 or 4 weights as indices into lists ("books") of
// the groups that are allowed. Element i of an entry is its byte i.
typedef struct moe__books {
    uint64_t iq2xxs[256], iq2xs[512], iq2s[1024]; // magnitudes 8, 25, 43
    uint64_t iq1s[2048];                          // int8: -8, 0, 8
    uint32_t iq3xxs[256];                         // magnitudes 4, 12, 20, 28, 36, 44, 52, 62
    uint32_t iq3s[512];                           // magnitudes 1, 3, .. 15
    uint16_t iq3xxs_16[2][256], iq3s_16[2][512];  // low and high halves of these
    uint8_t signs[128]; // 7 bits to 8: bit i set: element i is negative, always an even number
} moe__books;

// An entry is a number with one digit per element, element 0 the lowest: 8 digits of base 3 or 4
// of base 8. The numbers ascend; what is stored is how many are left out before each, as Rice
// codes: zeros for the high part, a one, then the low bits, highest first. A character holds six
// bits, lowest first, as '(' + value, without the backslash. Some lines end early: two question
// marks may not be neighbours.
static const char moe__books_iq2xxs[] =
    "I@4.KYB4/KYB5/SYcV/SbSdF/-1C.S[@5N`[@E?Kbf=66^KJVJ^DTV[YB<=?/f1<K^A?D?[`c>T7b79TV[CANg,W86>-U5"
    "[8N3d@=f`K0_b/IGT2FQC3+gcCg(V0/S^DT>dbAT22B`[cEfg]UV1h=O@+JYR@.9Nb1cgJ^D5:VRCZ-RX7R+;R4O=GTY.V"
    "=9E?cPd:6+R9V(<)(<K=ACdf.GP/SbS0AGJRZJ<)98/N^EMS2E49<F*c(H4C(,1Rc*;X/((ce)";
static const char moe__books_iq2xs[] =
    "9NANANANAOANANEVANE_Q4[4[4[4`4[6`U[M4[T[=NCCGc4[4[T[5[T[TMb:NA_b2[=gP[^_1Bg4[4[U`D?5bOb:JFQ1?8"
    "`Z4[4[T[5[T[f[D1[4dDMb:R;CN511]ANEVZT;fJ6?:H=[*gD;WNNU)3(50[4[4[=N31Q4?Z^KO.:g6?G*TPMa^F(EWQLM"
    "_*0^eB@dL6[4[4dD[4[4`F[M4[T[=N3AdhD;C*TANE_Q4?:U7?f*Bb[VH5?ZgG0M]S/7(_4[6`U[M,EVU5)BT(ANSe1MLh"
    "*g-FeTW_h8J>N((>gD1^WN6)(>3>W-(5A+B(a)BH,X+b+ANAOdOb:NTANA;2?@1I6fCOCN>:75>X:+3c^[2;_/(e8VWT[M"
    "]cbQ9+HLNV9V3H/_,](H,F@)]aI6d<gH-T3LE_]P1I.F((X;;3[.ed*T1@;@f";
static const char moe__books_iq2s[] =
    "QUUUUUfUUUfUUUf=hCCCCG^_g__`?U=S__?^CCd9hWdUUUfUUUUUUU=CCGG^____gg___gRUf=QUU/ff=Q=I__`_g`___g"
    "R`9C^_Fhf=Q6<Bf?2(M`___`g_g___g_hgRUUUUUUWUUUWBCGYdd^R?3F=PUfUUWWUUUWBCG=BCCCG^_gR]R8GG=B=P(UU"
    "UW`CdS:3aUf=Q=Y)MR89)XCdCChC^>?fK_RUR`R=Q=Ice`SH?e`_ggRUf=Q=IggR]RP/a=IJ+HFUa=)2]>-(H*2/ae*WUU"
    "UUUWUUUUUB^`?UUWUU=CCCdS__?M>UURggR]*FCCCCCdCCCdS__?M____?UUWR`R8CdS:S*-<UWUf=CdSZ=PUf=Q=IJJ>-"
    "2(H__`___`___?UUWaUUUf=CdS:S*ff=Q=Y3XCCCdS__?M>-BCG=B=P(W2c)(]_gR]R6-a=I*(Pa(8Ih_`_?ff=b2]_gR]"
    "R8Y9=PP(VhgR]R8)F=P6626((<eR(aXb(-((H+(`Cddd^RUfg^J``_gRUf-W2FhCYS*(BCCCW`_?M>-BCG=B=P6eRa-(8W"
    ">eR(PF)/<(H+Bb8fg_>=CdS:S*fBYSc(P=I*(]`_?M>-22B=P(8W+aa(]RP/(a-HF((((2]hdBS*HR(/<(RZG)]?e?-2(-"
    "=Y)(((<(HK+(<(8I+e:d)aX)";
static const char moe__books_iq1s[] =
    "fhJ_;eKQf,U`Yh9T`dh8eKQf,UO@Ned?cfHF4[TE(JAg*haUSShhI]h^(CX[h27[C8d1B7Y.;d1B7YC2.Oa5aGN_;]FJA1"
    "cGJ_+`NJOfg,aO,hhW`TSRFKY[+a/;]g`Kb/[FR;N<f?dOfRS7bf?hhG9=EGf?GEEfe-VFdSG=QdJM.CX.[hdWgAF@HGW8"
    "^gcZ.SFdI8P9hh_[T-eFJgO@>J_;]h,WA<NhWX,5[]3B7YFNQ?]F*h4V_h4N`:HAN`d;gI?fh[],[4;Y].+WOPf,74U/F7"
    ">C.F7h[,5-U/F7YFN_;]FJ5.Thh)TMEhgcfeh^9hWGR(Y7NI`_8,4+>8eh-^hgG2>UhcUhcdR]^V_?/f39fWh?^UG3da/["
    "Z,J_dGNhA>Q<d`_?^h1FGbG(+aOGCHIbSfgfFG57FFMOWgR_^Gf==^?dbS`F[d/WhB7,f2+-G=:h?"
    "?E=E=7h?S[?^?=`?G==?==^=^ORV2Ef=?cVSR:RRRRR7bSBAE-=W`0chRg*9hC>UhBNWgRRcSMLV2.3L[5G:=gGLVFXaOY"
    "TSh?(IbG7ONM<[1;B_+_+2K3),C4Hc]ghhSS/OgRg5hS.acdBE5c>EcJ0NPBhG^b^CGU>(BNI`[4;@B_ehQZ?WUJ0g,@/8"
    "dfd,*QAW/F79f[]FJ_;e7[dh2cA97;d1B7P5;d1B78.e0b`(CXT`eO_?/=hhh@Hf4W3S_J@Lbf,UGYC>WOPf<]KbhGhXX["
    "]FJ_;e+]FJ_;T3NfeKKaGNh`hhCRSfab`h4WAeh7F.70f_K5gScBeDUbf?"
    "?3QgcSRRW>B?^^h7C55GRCF2O2e[X[TfOD8TOYhh?WhhSfQOGWY88aGW)[?(UOPf,h+B79d1Qh(]:h+;S)Z/ZFJf4UOPf("
    ",[[RG=Y((ghYdbSAh^g)4CUX3EQ)C`cfFafHg)UOPf,_:4_F70*PfXd)f(UOPf";
static const char moe__books_iq3xxs[] =
    "9N;_9F*,AO;FEMO:hA6?FA3?CW9RHJJF<cT?278Y9`1K^O;FbLQ2a[d:XM;F/LCB-.WRI*gNL:+HYJ7WDZV,aZTZd8^YO`"
    ".Q14]?+c.*37U,-(;Ra8GbM4NA;S8MPZYXaEL(./^VB<a0AHOI>A;E+HI_-gM(36@<8@A(X<Q-0bag^[I[Jh)).=+^[)H+"
    "]>H]O>4aY*+]3(3,X(,XC)Z4+:7PMH,^XBT48aYML(]";
static const char moe__books_iq3s[] =
    "1A51U5?MV_2^_::Gg_d5L3BF[_gVV_J4?hR^QW0fKf6=OJ93W?]?4IUJ*)[Bbf*ZIO]O_NBSPE,5EfJ5^2R>cBVRK6RUMQ"
    "BV(9A=2:U`+J5^2.(_/:)>MBe+9f]_]_^OBUS0AE=``g<+e5B-S];`d6Q:5-MQLAd(AN88*+YS8)gIGLZ,HBUE>S]=RcUN"
    "<,Dc3=QM+,d:G0f2RSZ50c9TZ,2-).4(W0M)XVRG[4DR]BRPcI?96=XNZM2^6(S8A)0e:)0()*DX-.;)JF-fCD=B-K(a2I"
    "22*@:X8,VRK;b(D6T*(@(F9)(T>F))/`(,8IR49EVH)(0P@P+0X))@(82(He92WD-`@@-adc40()eI*c=)D(Pa(6@(@";

MOE__INLINE int moe__books_bit(const char *text, int at) {
    int c = text[at / 6];
    return (c - '(' - (c > '\\')) >> at % 6 & 1;
}

// count entries from a Rice code with n_low low bits, values[digit] instead of the digits.
MOE__PRIVATE void moe__books_expand(const char *text, int count, int n_low, int n_digits,
                                    const uint8_t *values, void *out) {
    uint8_t *bytes = (uint8_t *)out;
    int base = n_digits == 8 ? 3 : 8, at = 0, entry = -1;
    for (int i = 0; i < count; i++) {
        int gap = 0;
        while (!moe__books_bit(text, at++)) gap++;
        for (int b = 0; b < n_low; b++) gap = 2 * gap + moe__books_bit(text, at++);
        entry += gap + 1;
        for (int rest = entry, e = 0; e < n_digits; e++, rest /= base)
            *bytes++ = values[rest % base];
    }
}

MOE__PRIVATE void moe__books_fill(moe__books *books) {
    static const uint8_t iq2[] = {8, 25, 43}, iq1[] = {0xF8, 0, 8};
    static const uint8_t iq3xxs[] = {4, 12, 20, 28, 36, 44, 52, 62};
    static const uint8_t iq3s[] = {1, 3, 5, 7, 9, 11, 13, 15};
    moe__books_expand(moe__books_iq2xxs, 256, 4, 8, iq2, books->iq2xxs);
    moe__books_expand(moe__books_iq2xs, 512, 3, 8, iq2, books->iq2xs);
    moe__books_expand(moe__books_iq2s, 1024, 2, 8, iq2, books->iq2s);
    moe__books_expand(moe__books_iq1s, 2048, 1, 8, iq1, books->iq1s);
    moe__books_expand(moe__books_iq3xxs, 256, 3, 4, iq3xxs, books->iq3xxs);
    moe__books_expand(moe__books_iq3s, 512, 2, 4, iq3s, books->iq3s);
    for (int i = 0; i < 256; i++) {
        books->iq3xxs_16[0][i] = (uint16_t)(books->iq3xxs[i] & 0xFFFF);
        books->iq3xxs_16[1][i] = (uint16_t)(books->iq3xxs[i] >> 16);
    }
    for (int i = 0; i < 512; i++) {
        books->iq3s_16[0][i] = (uint16_t)(books->iq3s[i] & 0xFFFF);
        books->iq3s_16[1][i] = (uint16_t)(books->iq3s[i] >> 16);
    }
    for (int i = 0; i < 128; i++) {
        int odd = 0x6996 >> ((i ^ i >> 4) & 15) & 1; // bit k: k has an odd number of ones
        books->signs[i] = (uint8_t)(i | odd << 7);
    }
}

// One copy per process, filled by the first caller: from then on a load and a branch.
static moe__books moe__books_shared;
static pthread_once_t moe__books_once = PTHREAD_ONCE_INIT;
static int moe__books_ready;

MOE__PRIVATE void moe__books_make(void) {
    moe__books_fill(&moe__books_shared);
    __atomic_store_n(&moe__books_ready, 1, __ATOMIC_RELEASE);
}
MOE__INLINE const moe__books *moe__books_get(void) {
    if (!__atomic_load_n(&moe__books_ready, __ATOMIC_ACQUIRE))
        (void)pthread_once(&moe__books_once, moe__books_make);
    return &moe__books_shared;
}

// ---- the bits of the blocks ------------------------------------------------------------------

// Up to 256 weights as every block type can be written: weight i = d * scale[i / 16] * q[i] -
// dmin * min[i / 16], all but d and dmin integers. Types that are multiplied with MOE__ACT_Q256
// have one d and dmin (the first) per block, the others one per 16 weights, and then scale and
// min are 1.
typedef struct moe__block {
    int8_t q[256];
    int16_t scale[16], min[16];
    float d[16], dmin[16];
} moe__block;

// Levels of the types whose levels are not evenly spaced, by index. The tables of IQ2_K .. IQ6_K
// are used twice, the second time shifted by a constant.
static const int8_t moe__levels_fp4[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                           0, -1, -2, -3, -4, -6, -8, -12}; // twice E2M1
static const int8_t moe__levels_k2[4] = {-31, -13, 1, 17};
static const int8_t moe__levels_k3[8] = {-63, -40, -23, -10, 1, 13, 28, 47};
static const int8_t moe__levels_k4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};
static const int8_t moe__levels_k5[32] = {-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36,
                                          -30,  -24,  -18,  -12, -6,  -1,  5,   11,  17,  23,  29,
                                          36,   43,   51,   59,  68,  77,  87,  97,  109, 121};
static const int8_t moe__levels_k6[64] = {
    -127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54,
    -51,  -47,  -44,  -40,  -37,  -34, -31, -28, -25, -22, -19, -16, -13, -11, -8,  -5,
    -2,   0,    3,    6,    9,    12,  14,  17,  20,  23,  27,  30,  33,  36,  40,  44,
    47,   51,   55,   59,   63,   68,  72,  77,  82,  87,  92,  98,  103, 109, 115, 121};
enum { MOE__SHIFT_K2 = 5, MOE__SHIFT_K3 = 4, MOE__SHIFT_K4 = 4, MOE__SHIFT_K5 = 2,
       MOE__SHIFT_K6 = 1 };
// IQ2_KL: the first and the second of a pair of neighbours, by 5-bit index
static const int8_t moe__levels_kl[2][32] = {
    {-63, -63, -40, -40, -40, -40, -23, -23, -23, -23, -23, -10, -10, -10, -10, 1, 1, 1, 1,
     1, 13, 13, 13, 13, 13, 28, 28, 28, 28, 28, 47, 47},
    {-23, 13, -63, -10, 13, 47, -40, -23, 1, 13, 28, -63, 1, 13, 47, -23, -10, 1, 13, 28,
     -40, -23, -10, 1, 13, -63, -23, 1, 28, 47, -23, 13}};

MOE__INLINE float moe__types_f16(const uint8_t *p) { return moe__f16_to_f32(moe__load_u16(p)); }
MOE__INLINE float moe__types_bf16(const uint8_t *p) { return moe__bf16_to_f32(moe__load_u16(p)); }
// 2^(e - 128): the scale of MXFP4, halved because its levels are doubled.
MOE__INLINE float moe__types_e8m0(unsigned e) {
    return moe__f32_from_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);
}
// Half of an unsigned E4M3 number: 4 bits of exponent, 3 of mantissa. 127 counts as 0.
MOE__INLINE float moe__types_ue4m3(unsigned x) {
    unsigned e = x >> 3 & 15, m = x & 7;
    if (x == 0x7F) return 0;
    if (e == 0) return (float)m / 1024.0f;
    return (float)(8 + m) * moe__f32_from_bits((e + 127 - 11) << 23);
}

// ---- layouts: words --------------------------------------------------------------------------

// What the bits of a type mean is said once, by a macro MOE__LAYOUT_NAME: a list of words, and
// behind each the bytes of the block that it reads. It is read twice, here, where a word is a
// function that returns one weight or one scale (the definition, and what runs without vector
// kernels), and in the vector text of >>kernels, where the word of the same name returns a vector
// of weights or all scales of a block. The words here are (b: the block, p: where in it)
//
//   moe__d_   set d, and dmin if there is one
//   moe__s_   integer scale s, min s or shift s of n
//   moe__w_   weight 16 h + i, i < 16: its level plus the type's offset, or index of a table
//   moe__rd_ moe__rs_ moe__rw_   the same of row k of interleaved rows
#define MOE__UNUSED __attribute__((unused))
#define MOE__READER(type, name, ...) \
    MOE__INLINE type moe__##name(const uint8_t *b MOE__UNUSED, __VA_ARGS__)
#define MOE__W(name, ...) \
    MOE__READER(int, w_##name, __VA_ARGS__, int h MOE__UNUSED, int i MOE__UNUSED)
#define MOE__S(name, ...) \
    MOE__READER(int, s_##name, __VA_ARGS__, int n MOE__UNUSED, int s MOE__UNUSED)
#define MOE__AT_BLOCK int k MOE__UNUSED, float D MOE__UNUSED, moe__block *out
#define MOE__SET(name, ...) MOE__READER(void, d_##name, __VA_ARGS__, MOE__AT_BLOCK)
#define MOE__RW(name, ...) MOE__READER(int, rw_##name, __VA_ARGS__, int k, int h, int i)
#define MOE__RS(name, ...) MOE__READER(int, rs_##name, __VA_ARGS__, int k, int n MOE__UNUSED, int s)
#define MOE__RSET(name, ...) MOE__READER(void, rd_##name, __VA_ARGS__, MOE__AT_BLOCK)

MOE__INLINE int moe__types_nibble(int byte, int high) { return high ? byte >> 4 : byte & 15; }
MOE__INLINE int moe__types_bit(int x, int i) { return x >> i & 1; }

// Fields of `bits` bits: each 32 bytes hold as many sub-blocks of 32 weights as fit, the first in
// the low bits.
MOE__INLINE int moe__w_field(const uint8_t *p, int bits, int h, int i) {
    const int fit = 8 / bits, mask = (1 << bits) - 1;
    return p[32 * (h / 2 / fit) + 16 * (h % 2) + i] >> bits * (h / 2 % fit) & mask;
}
MOE__W(two, int p) { return moe__w_field(b + p, 2, h, i); }
MOE__W(four, int p) { return moe__w_field(b + p, 4, h, i); }
MOE__W(three, int two, int one) {
    return moe__w_two(b, two, h, i) | moe__w_field(b + one, 1, h, i) << 2;
}
MOE__W(five, int four, int one) {
    return moe__w_four(b, four, h, i) | moe__w_field(b + one, 1, h, i) << 4;
}
MOE__W(six, int four, int two) {
    return moe__w_four(b, four, h, i) | moe__w_two(b, two, h, i) << 4;
}
// As six, but 64 bytes hold 128 low parts, the first half in the low nibbles
MOE__W(six_64, int four, int two) {
    const int low = moe__types_nibble(b[four + 64 * (h / 8) + 16 * (h % 4) + i], h / 4 % 2);
    return low | moe__w_two(b, two, h, i) << 4;
}
// 16 bytes hold 32 weights, the first half in the low nibbles.
MOE__W(nibbles, int p) { return moe__types_nibble(b[p + 16 * (h / 2) + i], h % 2); }
// Of 32 weights: nibbles, and bit 16 h + i of 32
MOE__W(nibbles_one, int p, int one) {
    return moe__w_nibbles(b, p, h, i) | (int)(moe__load_u32(b + one) >> (16 * h + i) & 1) << 4;
}
// Of 32 weights: nibbles, and 8 bytes that each hold pairs of bits of weights x, 16 + x, 8 + x and
// 24 + x, the first in the low bits
MOE__W(nibbles_two, int p, int two) {
    return moe__w_nibbles(b, p, h, i) | (b[two + i % 8] >> (4 * (i / 8) + 2 * h) & 3) << 4;
}
MOE__W(int8, int p) { return (int8_t)b[p + 16 * h + i] + 128; }
// Digits of base 3, the first of a byte (which is a fraction of 256) the highest: 32 bytes of five
// weights, 32 apart; 16 of five, 16 apart; 4 of four, 4 apart
MOE__W(base3, int p) {
    static const uint8_t power[5] = {1, 3, 9, 27, 81};
    const int x = h < 10   ? b[p + 16 * (h % 2) + i] * power[h / 2]
                  : h < 15 ? b[p + 32 + i] * power[h - 10]
                           : b[p + 48 + i % 4] * power[i / 4];
    return 3 * (x & 255) >> 8;
}
// Two neighbours are an entry of a table of pairs, of levels, to which the offset 64 is added: 16
// bytes hold the low nibbles of two sub-blocks of 32 weights; bit j of 16 more bytes is the fifth
// bit in sub-block j.
MOE__W(pairs, int p, int one) {
    const int j = h / 2, pair = 8 * (h % 2) + i / 2;
    const int low = moe__types_nibble(b[p + 16 * (j / 2) + pair], j % 2);
    return moe__levels_kl[i % 2][low | moe__types_bit(b[one + pair], j) << 4] + 64;
}

MOE__S(one, int p) { return (void)p, 1; }
MOE__S(int8, int p) { return (int8_t)b[p + s]; }
// The low or high four bits of each byte
MOE__S(low, int p) { return b[p + s] & 15; }
MOE__S(high, int p) { return b[p + s] >> 4; }
// Nibbles, those of scales 2 x and 2 x + 1 in byte x; or with the first half of the scales low
MOE__INLINE int moe__s_nibble(const uint8_t *p, int s) {
    return moe__types_nibble(p[s / 2], s % 2);
}
MOE__INLINE int moe__s_half(const uint8_t *p, int n, int s) {
    return moe__types_nibble(p[s % (n / 2)], s / (n / 2));
}
// Nibbles less 8
MOE__S(four, int p) { return moe__s_nibble(b + p, s) - 8; }
// Nibbles, doubled, plus 1; the signs from 16 bits
MOE__S(odd, int p) { return 2 * moe__s_nibble(b + p, s) + 1; }
MOE__S(odd_signed, int p, int signs) {
    const int x = moe__s_odd(b, p, n, s);
    return moe__types_bit(moe__load_u16(b + signs), s) ? -x : x;
}
// Five bits less 16: nibbles (halves: the first half low), and fifth bits in a byte
MOE__S(five, int p, int one) {
    return (moe__s_nibble(b + p, s) | moe__types_bit(b[one], s) << 4) - 16;
}
MOE__S(five_halves, int p, int one) {
    return (moe__s_half(b + p, n, s) | moe__types_bit(b[one], s) << 4) - 16;
}
// Six bits less 32: nibbles (halves: the first half low), and pairs of bits, one after another;
// or (split) each byte those of scales x, 4 + x, 8 + x and 12 + x
MOE__S(six, int p, int two) {
    return (moe__s_nibble(b + p, s) | (b[two + s / 4] >> 2 * (s % 4) & 3) << 4) - 32;
}
MOE__S(six_halves, int p, int two) {
    return (moe__s_half(b + p, n, s) | (b[two + s / 4] >> 2 * (s % 4) & 3) << 4) - 32;
}
MOE__S(six_split, int p, int two) {
    return (moe__s_half(b + p, n, s) | (b[two + s % 4] >> 2 * (s / 4) & 3) << 4) - 32;
}
// Eight 6-bit scales (mins = 0) and eight 6-bit mins (1) in 12 bytes:
//   bytes 0-3    scale 0-3, and in the top two bits those of scale 4-7
//   bytes 4-7    min 0-3, and in the top two bits those of min 4-7
//   bytes 8-11   low four bits of scale 4-7, low four bits of min 4-7
MOE__S(six_k, int p, int mins) {
    if (s < 4) return b[p + 4 * mins + s] & 63;
    return moe__types_nibble(b[p + 4 + s], mins) | b[p + 4 * mins + s - 4] >> 6 << 4;
}
// Bytes less 127 whose lowest bit is not part of them; `by` if it is set
MOE__S(even, int p) { return (b[p + s] & 254) - 127; }
MOE__S(lowest, int p, int by) { return b[p + s] & 1 ? by : 0; }
// `by` if bit s (of n) is set
MOE__S(bits, int p, int by) { return moe__types_bit(b[p + s / 8], s % 8) ? by : 0; }

MOE__SET(half, int p) { out->d[0] = moe__types_f16(b + p); }
// d and dmin; d and minus the min of a block of 32
MOE__SET(halves, int p) {
    out->d[0] = moe__types_f16(b + p), out->dmin[0] = moe__types_f16(b + p + 2);
}
MOE__SET(half_min, int p) {
    out->d[0] = moe__types_f16(b + p), out->dmin[0] = -moe__types_f16(b + p + 2);
}
MOE__SET(e8m0, int p) { out->d[0] = moe__types_e8m0(b[p]); }
// It stands before the blocks of the row.
MOE__SET(row, int p) { (void)p, out->d[0] = D; }

// Interleaved rows: four neighbouring weights of a row lie together, then the same of the next
// row. t = 0..3 counts these fours in 16 weights. In units of 16 bytes, one of which holds a four
// of each of 4 rows, and for every 32 weights, whose halves are h % 2 = 0 and 1:
//   nibbles  4 units; the four is in unit h % 2 + 2 (t % 2), the high half for t = 2 and 3
//   two      2 units, one for each half; bits y (t % 2) + z (t / 2) and the next
//   one      1 unit; bit x (h % 2) + y (t % 2) + z (t / 2), where x, y, z are different per type
MOE__RW(nibbles, int p) {
    p += 64 * (h / 2) + 16 * (h % 2 + 2 * (i / 4 % 2));
    return moe__types_nibble(b[p + 4 * k + i % 4], i / 8);
}
MOE__INLINE int moe__rw_pair(const uint8_t *p, int y, int z, int k, int h, int i) {
    return p[16 * h + 4 * k + i % 4] >> (y * (i / 4 % 2) + z * (i / 8)) & 3;
}
MOE__INLINE int moe__rw_bit(const uint8_t *p, int x, int y, int z, int k, int h, int i) {
    const int shift = x * (h % 2) + y * (i / 4 % 2) + z * (i / 8);
    return p[16 * (h / 2) + 4 * k + i % 4] >> shift & 1;
}
MOE__RW(two, int p) { return moe__rw_pair(b + p, 2, 4, k, h, i); }
MOE__RW(three, int two, int one, int x, int y, int z) {
    return moe__rw_two(b, two, k, h, i) | moe__rw_bit(b + one, x, y, z, k, h, i) << 2;
}
MOE__RW(five, int four, int one, int x, int y, int z) {
    return moe__rw_nibbles(b, four, k, h, i) | moe__rw_bit(b + one, x, y, z, k, h, i) << 4;
}
MOE__RW(six, int four, int two, int y, int z) {
    return moe__rw_nibbles(b, four, k, h, i) | moe__rw_pair(b + two, y, z, k, h, i) << 4;
}
// Eight rows: a four of each is 32 bytes. Nibbles: the first 16 weights are low, the others high.
MOE__RW(nibbles_8, int p) { return moe__types_nibble(b[p + 32 * (i / 4) + 4 * k + i % 4], h); }
MOE__RW(int8_8, int p) { return (int8_t)b[p + 32 * (4 * h + i / 4) + 4 * k + i % 4] + 128; }

// Scale s of row k is number r = 4 s + k.
MOE__RS(int8, int p) { return (int8_t)b[p + 4 * s + k]; }
MOE__RS(low, int p) { return b[p + 4 * s + k] & 15; }
MOE__RS(high, int p) { return b[p + 4 * s + k] >> 4; }
// 64 nibbles in 32 bytes, the first half low; bits r / 8 of byte r % 8; pairs of bits in 16 bytes
MOE__INLINE int moe__rs_nibble(const uint8_t *p, int r) {
    return moe__types_nibble(p[r % 32], r / 32);
}
MOE__INLINE int moe__rs_bit(const uint8_t *p, int r) { return moe__types_bit(p[r % 8], r / 8); }
MOE__INLINE int moe__rs_pair(const uint8_t *p, int r) { return p[r % 16] >> 2 * (r / 16) & 3; }
MOE__RS(four, int p) { return moe__rs_nibble(b + p, 4 * s + k) - 8; }
MOE__RS(odd_signed, int p, int signs) {
    const int x = 2 * moe__rs_nibble(b + p, 4 * s + k) + 1;
    return moe__rs_bit(b + signs, 4 * s + k) ? -x : x;
}
MOE__RS(six, int p, int two) {
    return (moe__rs_nibble(b + p, 4 * s + k) | moe__rs_pair(b + two, 4 * s + k) << 4) - 32;
}
// 32 6-bit scales (mins = 0), 32 6-bit mins (1): low parts as low and high, then 16 bytes whose
// bits 4 (r / 16) + 2 mins and the next are the high parts
MOE__RS(six_k, int p, int two, int mins) {
    const int r = 4 * s + k, shift = 4 * (r / 16) + 2 * mins;
    return moe__types_nibble(b[p + r], mins) | (b[two + r % 16] >> shift & 3) << 4;
}
MOE__RS(even, int p) { return (b[p + 4 * s + k] & 254) - 127; }
MOE__RS(lowest, int p, int by) { return b[p + 4 * s + k] & 1 ? by : 0; }
MOE__RS(bits, int p, int by) { return moe__rs_bit(b + p, 4 * s + k) ? by : 0; }

MOE__RSET(half, int p) { out->d[0] = moe__types_f16(b + p + 2 * k); }
MOE__RSET(halves, int p) { // of four rows
    out->d[0] = moe__types_f16(b + p + 2 * k), out->dmin[0] = moe__types_f16(b + p + 8 + 2 * k);
}
MOE__RSET(e8m0, int p) { out->d[0] = moe__types_e8m0(b[p + k]); }
MOE__RSET(row, int p) { moe__d_row(b, p, k, D, out); }
#undef MOE__READER
#undef MOE__W
#undef MOE__S
#undef MOE__AT_BLOCK
#undef MOE__SET
#undef MOE__RW
#undef MOE__RS
#undef MOE__RSET

// ---- layouts ---------------------------------------------------------------------------------

// A layout is one of these. Behind each word stand the bytes it reads, counted from the first of
// the block; above it is a picture of all bytes. "Nibbles", "two bits" and so on are in the orders
// of the words of these names.
//   MOE__OF_32(NAME, name, d, (), table, level, ())                                  32 weights
//   MOE__OF_256(NAME, name, order, d, (), scale, (), more, which, (), table, level, ())
//   MOE__OF_BOOKS(NAME, name, order, more)                               256 with a code book
//   MOE__OF_R4(NAME, name, d, (), scale, (), more, which, (), table, level, ())      4 rows of 256
//   MOE__OF_ROWS_32(NAME, name, d, (), table, level, ())                 4 or 8 rows of 32
//   MOE__OF_OTHER_32(NAME, name), MOE__OF_OTHER_ROWS(NAME, name)         written out in both texts
// table: the levels (moe__levels_...) that the indices stand for; `even`: level less offset.
// more: what there is besides scales: MINS (integers, dmin is their scale), SHIFTS (integers added
// to levels, where a bit says so) or NOTHING; `which` is the word for it (of NOTHING any
// word, it is not read).
// order: which weights a vector of 512 bits holds, see "levels" in >>kernels.
enum { MOE__NATURAL, MOE__FOURS, MOE__TWOS, MOE__HALVES };

// Q4_0    0 d f16 | 2 nibbles
#define MOE__LAYOUT_Q4_0 MOE__OF_32(Q4_0, q4_0, half, (0), even, nibbles, (2))
// Q4_1    0 d f16 | 2 -min f16 | 4 nibbles
#define MOE__LAYOUT_Q4_1 MOE__OF_32(Q4_1, q4_1, half_min, (0), even, nibbles, (4))
// Q5_0    0 d f16 | 2 a fifth bit of each weight | 6 nibbles
#define MOE__LAYOUT_Q5_0 MOE__OF_32(Q5_0, q5_0, half, (0), even, nibbles_one, (6, 2))
// Q5_1    0 d f16 | 2 -min f16 | 4 a fifth bit of each weight | 8 nibbles
#define MOE__LAYOUT_Q5_1 MOE__OF_32(Q5_1, q5_1, half_min, (0), even, nibbles_one, (8, 4))
// Q6_0    0 d f16 | 2 two high bits of each weight | 10 nibbles
#define MOE__LAYOUT_Q6_0 MOE__OF_32(Q6_0, q6_0, half, (0), even, nibbles_two, (10, 2))
// Q8_0    0 d f16 | 2 int8
#define MOE__LAYOUT_Q8_0 MOE__OF_32(Q8_0, q8_0, half, (0), even, int8, (2))
// IQ4_NL  0 d f16 | 2 nibbles
#define MOE__LAYOUT_IQ4_NL MOE__OF_32(IQ4_NL, iq4_nl, half, (0), k4, nibbles, (2))
// MXFP4   0 d, an exponent | 1 nibbles
#define MOE__LAYOUT_MXFP4 MOE__OF_32(MXFP4, mxfp4, e8m0, (0), fp4, nibbles, (1))
// NVFP4   0 four scales E4M3, one per 16 weights | 4 for each: 8 bytes of nibbles
#define MOE__LAYOUT_NVFP4 MOE__OF_OTHER_32(NVFP4, nvfp4)

// Q2_K    0 scale and min of each 16 weights, four bits each | 16 two bits | 80 d f16 | 82 dmin f16
#define MOE__LAYOUT_Q2_K                                                                          \
    MOE__OF_256(Q2_K, q2_k, TWOS, halves, (80), low, (0), MINS, high, (0), even, two, (16))
// Q3_K    0 third bits | 32 two bits | 96 scales: low four bits | 104 high two bits | 108 d f16
#define MOE__LAYOUT_Q3_K                                                                          \
    MOE__OF_256(Q3_K, q3_k, TWOS, half, (108), six_split, (96, 104), NOTHING, one, (0), even,     \
                three, (32, 0))
// Q4_K    0 d f16 | 2 dmin f16 | 4 scales and mins of each 32 weights | 16 four bits
#define MOE__LAYOUT_Q4_K                                                                          \
    MOE__OF_256(Q4_K, q4_k, FOURS, halves, (0), six_k, (4, 0), MINS, six_k, (4, 1), even,         \
                four, (16))
// Q5_K    as Q4_K up to 16 fifth bits | 48 four bits
#define MOE__LAYOUT_Q5_K                                                                          \
    MOE__OF_256(Q5_K, q5_k, FOURS, halves, (0), six_k, (4, 0), MINS, six_k, (4, 1), even,         \
                five, (48, 16))
// Q6_K    0 low four bits | 128 high two bits | 192 scales int8 | 208 d f16
#define MOE__LAYOUT_Q6_K                                                                          \
    MOE__OF_256(Q6_K, q6_k, FOURS, half, (208), int8, (192), NOTHING, one, (0), even,             \
                six_64, (0, 128))

// TQ1_0   0 digits of base 3 | 52 d f16
#define MOE__LAYOUT_TQ1_0                                                                         \
    MOE__OF_256(TQ1_0, tq1_0, FOURS, half, (52), one, (0), NOTHING, one, (0), even, base3, (0))
// TQ2_0   0 two bits | 64 d f16
#define MOE__LAYOUT_TQ2_0                                                                         \
    MOE__OF_256(TQ2_0, tq2_0, TWOS, half, (64), one, (0), NOTHING, one, (0), even, two, (0))

// IQ4_XS  0 d f16 | 2 scales: high two bits | 4 low four bits | 8 nibbles
#define MOE__LAYOUT_IQ4_XS                                                                        \
    MOE__OF_256(IQ4_XS, iq4_xs, HALVES, half, (0), six, (4, 2), NOTHING, one, (0), k4,            \
                nibbles, (8))
// IQ2_K   0 d f16 | 2 a bit of each 16 weights: levels shifted | 4 scales, four bits | 12 two bits
#define MOE__LAYOUT_IQ2_K                                                                         \
    MOE__OF_256(IQ2_K, iq2_k, TWOS, half, (0), four, (4), SHIFTS, bits, (2, MOE__SHIFT_K2), k2,   \
                two, (12))
// IQ3_K   0 d f16 | 2 bits: shifted | 4 signs of scales | 6 scales | 14 two bits | 78 third bits
#define MOE__LAYOUT_IQ3_K                                                                         \
    MOE__OF_256(IQ3_K, iq3_k, TWOS, half, (0), odd_signed, (6, 4), SHIFTS,                        \
                bits, (2, MOE__SHIFT_K3), k3, three, (14, 78))
// IQ4_K   0 d f16 | 2 bits: shifted | 4 scales: high two bits | 8 low four bits | 16 nibbles
#define MOE__LAYOUT_IQ4_K                                                                         \
    MOE__OF_256(IQ4_K, iq4_k, HALVES, half, (0), six, (8, 4), SHIFTS, bits, (2, MOE__SHIFT_K4),   \
                k4, nibbles, (16))
// IQ5_K   as IQ4_K up to 16 four bits | 144 fifth bits
#define MOE__LAYOUT_IQ5_K                                                                         \
    MOE__OF_256(IQ5_K, iq5_k, FOURS, half, (0), six, (8, 4), SHIFTS, bits, (2, MOE__SHIFT_K5),    \
                k5, five, (16, 144))
// IQ6_K   0 d f16 | 2 bits: shifted | 4 scales int8 | 20 four bits | 148 high two bits
#define MOE__LAYOUT_IQ6_K                                                                         \
    MOE__OF_256(IQ6_K, iq6_k, FOURS, half, (0), int8, (4), SHIFTS, bits, (2, MOE__SHIFT_K6), k6,  \
                six, (20, 148))
// IQ2_KS  0 a bit of each 32 weights: shifted | 1 scales: fifth bits | 2 low four bits | 6 two bits
#define MOE__LAYOUT_IQ2_KS                                                                        \
    MOE__OF_256(IQ2_KS, iq2_ks, TWOS, row, (0), five, (2, 1), SHIFTS, bits, (0, MOE__SHIFT_K2),   \
                k2, two, (6))
// IQ3_KS  0 scales: fifth bits | 1 bits: shifted | 2 low four bits | 6 two bits | 70 third bits
#define MOE__LAYOUT_IQ3_KS                                                                        \
    MOE__OF_256(IQ3_KS, iq3_ks, TWOS, row, (0), five_halves, (2, 0), SHIFTS,                      \
                bits, (1, MOE__SHIFT_K3), k3, three, (6, 70))
// IQ4_KS  0 scales, the lowest bit: shifted | 8 nibbles
#define MOE__LAYOUT_IQ4_KS                                                                        \
    MOE__OF_256(IQ4_KS, iq4_ks, HALVES, row, (0), even, (0), SHIFTS, lowest, (0, MOE__SHIFT_K4),  \
                k4, nibbles, (8))
// IQ5_KS  0 scales, the lowest bit: shifted | 8 four bits | 136 fifth bits
#define MOE__LAYOUT_IQ5_KS                                                                        \
    MOE__OF_256(IQ5_KS, iq5_ks, FOURS, row, (0), even, (0), SHIFTS, lowest, (0, MOE__SHIFT_K5),   \
                k5, five, (8, 136))
// IQ2_KL  0 scales: high two bits | 2 low four bits | 6 pairs: low nibbles | 70 fifth bits
#define MOE__LAYOUT_IQ2_KL                                                                        \
    MOE__OF_256(IQ2_KL, iq2_kl, NATURAL, row, (0), six_halves, (2, 0), NOTHING, one, (0), even,   \
                pairs, (6, 70))

// Types with code books are written out in both texts: plain C asks which entry a weight is in,
// vectors make all indices and signs of a block first. A description of both would be longer.
#define MOE__LAYOUT_IQ1_S MOE__OF_BOOKS(IQ1_S, iq1_s, FOURS, SHIFTS)
#define MOE__LAYOUT_IQ1_M MOE__OF_BOOKS(IQ1_M, iq1_m, FOURS, NOTHING)
#define MOE__LAYOUT_IQ2_XXS MOE__OF_BOOKS(IQ2_XXS, iq2_xxs, FOURS, NOTHING)
#define MOE__LAYOUT_IQ2_XS MOE__OF_BOOKS(IQ2_XS, iq2_xs, FOURS, NOTHING)
#define MOE__LAYOUT_IQ2_S MOE__OF_BOOKS(IQ2_S, iq2_s, FOURS, NOTHING)
#define MOE__LAYOUT_IQ3_XXS MOE__OF_BOOKS(IQ3_XXS, iq3_xxs, HALVES, NOTHING)
#define MOE__LAYOUT_IQ3_S MOE__OF_BOOKS(IQ3_S, iq3_s, HALVES, NOTHING)

// Groups of rows: bytes are those of the block of the group, fields hold those of all its rows.
// The _KS types have the d of each row before all blocks, as f32.
// Q4_0_R8 0 d f16 | 16 nibbles
#define MOE__LAYOUT_Q4_0_R8 MOE__OF_ROWS_32(Q4_0_R8, q4_0_r8, half, (0), even, nibbles_8, (16))
// Q8_0_R8 0 d f16 | 16 int8
#define MOE__LAYOUT_Q8_0_R8 MOE__OF_ROWS_32(Q8_0_R8, q8_0_r8, half, (0), even, int8_8, (16))
// MXFP4_R8 0 d, exponents | 8 nibbles
#define MOE__LAYOUT_MXFP4_R8 MOE__OF_ROWS_32(MXFP4_R8, mxfp4_r8, e8m0, (0), fp4, nibbles_8, (8))
// IQ4_NL_R4 0 d f16 | 8 nibbles
#define MOE__LAYOUT_IQ4_NL_R4 MOE__OF_ROWS_32(IQ4_NL_R4, iq4_nl_r4, half, (0), k4, nibbles, (8))
// Q5_0_R4 0 d f16 | 8 fifth bits | 24 nibbles
#define MOE__LAYOUT_Q5_0_R4 \
    MOE__OF_ROWS_32(Q5_0_R4, q5_0_r4, half, (0), even, five, (24, 8, 1, 2, 4))
// Q2_K_R4 0 d f16 | 8 dmin f16 | 16 scales and mins, four bits each | 80 two bits
#define MOE__LAYOUT_Q2_K_R4                                                                       \
    MOE__OF_R4(Q2_K_R4, q2_k_r4, halves, (0), low, (16), MINS, high, (16), even, two, (80))
// Q3_K_R4 0 d f16 | 8 scales: high two bits | 24 low four bits | 56 third bits | 184 two bits
#define MOE__LAYOUT_Q3_K_R4                                                                       \
    MOE__OF_R4(Q3_K_R4, q3_k_r4, half, (0), six, (24, 8), NOTHING, low, (0), even,                \
               three, (184, 56, 4, 1, 2))
// Q4_K_R4 0 d f16 | 8 dmin f16 | 16 scales and mins: high bits | 32 low four bits | 64 nibbles
#define MOE__LAYOUT_Q4_K_R4                                                                       \
    MOE__OF_R4(Q4_K_R4, q4_k_r4, halves, (0), six_k, (32, 16, 0), MINS, six_k, (32, 16, 1), even, \
               nibbles, (64))
// Q5_K_R4 as Q4_K_R4 up to 64 fifth bits | 192 nibbles
#define MOE__LAYOUT_Q5_K_R4                                                                       \
    MOE__OF_R4(Q5_K_R4, q5_k_r4, halves, (0), six_k, (32, 16, 0), MINS, six_k, (32, 16, 1), even, \
               five, (192, 64, 4, 2, 1))
// Q6_K_R4 0 d f16 | 8 scales int8 | 72 high two bits | 328 nibbles
#define MOE__LAYOUT_Q6_K_R4                                                                       \
    MOE__OF_R4(Q6_K_R4, q6_k_r4, half, (0), int8, (8), NOTHING, low, (0), even,                   \
               six, (328, 72, 4, 2))
// IQ2_K_R4 0 d f16 | 8 bits: shifted | 16 scales, four bits | 48 two bits
#define MOE__LAYOUT_IQ2_K_R4                                                                      \
    MOE__OF_R4(IQ2_K_R4, iq2_k_r4, half, (0), four, (16), SHIFTS, bits, (8, MOE__SHIFT_K2), k2,   \
               two, (48))
// IQ3_K_R4 as IQ2_K_R4 up to 16 signs of scales | 24 scales | 56 two bits | 312 third bits
#define MOE__LAYOUT_IQ3_K_R4                                                                      \
    MOE__OF_R4(IQ3_K_R4, iq3_k_r4, half, (0), odd_signed, (24, 16), SHIFTS,                       \
               bits, (8, MOE__SHIFT_K3), k3, three, (56, 312, 4, 1, 2))
// IQ4_K_R4 0 d f16 | 8 bits: shifted | 16 scales: high two bits | 32 low four bits | 64 nibbles
#define MOE__LAYOUT_IQ4_K_R4                                                                      \
    MOE__OF_R4(IQ4_K_R4, iq4_k_r4, half, (0), six, (32, 16), SHIFTS, bits, (8, MOE__SHIFT_K4),    \
               k4, nibbles, (64))
// IQ5_K_R4 as IQ4_K_R4 | 576 fifth bits
#define MOE__LAYOUT_IQ5_K_R4                                                                      \
    MOE__OF_R4(IQ5_K_R4, iq5_k_r4, half, (0), six, (32, 16), SHIFTS, bits, (8, MOE__SHIFT_K5),    \
               k5, five, (64, 576, 2, 4, 1))
// IQ4_KS_R4 0 scales, the lowest bit: shifted | 32 nibbles
#define MOE__LAYOUT_IQ4_KS_R4                                                                     \
    MOE__OF_R4(IQ4_KS_R4, iq4_ks_r4, row, (0), even, (0), SHIFTS, lowest, (0, MOE__SHIFT_K4),     \
               k4, nibbles, (32))
// IQ5_KS_R4 as IQ4_KS_R4 | 544 fifth bits
#define MOE__LAYOUT_IQ5_KS_R4                                                                     \
    MOE__OF_R4(IQ5_KS_R4, iq5_ks_r4, row, (0), even, (0), SHIFTS, lowest, (0, MOE__SHIFT_K5),     \
               k5, five, (32, 544, 2, 4, 1))
// IQ4_XS_R8 0 d f16 | 16 scales: high two bits | 32 low four bits | 64 nibbles
#define MOE__LAYOUT_IQ4_XS_R8 MOE__OF_OTHER_ROWS(IQ4_XS_R8, iq4_xs_r8)

// ---- layouts in plain C ----------------------------------------------------------------------

// moe__unpack_NAME unpacks one block of a row. Of interleaved rows b is the group's block and k
// the row in the group. D: the row's scale, for types that have one.
#define MOE__UNPACK(name)                                                                    \
    MOE__PRIVATE void moe__unpack_##name(const uint8_t *__restrict__ b,                      \
                                         int k __attribute__((unused)),                      \
                                         float D __attribute__((unused)),                    \
                                         moe__block *__restrict__ out)
#define MOE__ARGS(...) __VA_ARGS__
#define moe__levels_even NULL
MOE__INLINE int moe__types_level_of(const int8_t *table, int x, int offset) {
    return table ? table[x] : x - offset;
}

// n numbers for the 16 sixteens of weights
#define MOE__EACH_SCALE(to, value)                           \
    for (int s = 0, each = 16 / n; s < n; s++)               \
        to[each * s] = to[each * (s + 1) - 1] = (int16_t)(value)
#define MOE__PUT_NOTHING(value)
#define MOE__PUT_MINS(value) MOE__EACH_SCALE(out->min, value);
#define MOE__PUT_SHIFTS(value) MOE__EACH_SCALE(shift, value);
#define MOE__ADD_NOTHING 0
#define MOE__ADD_MINS 0
#define MOE__ADD_SHIFTS shift[h]

// 32 weights; d of both halves is the same.
#define MOE__UNPACK_32(NAME, name, set_d, table, level)                                        \
    MOE__UNPACK(name) {                                                                        \
        set_d;                                                                                 \
        out->d[1] = out->d[0], out->dmin[1] = out->dmin[0];                                    \
        out->scale[0] = out->scale[1] = out->min[0] = out->min[1] = 1;                         \
        for (int h = 0; h < 2; h++)                                                            \
            for (int i = 0; i < 16; i++)                                                       \
                out->q[16 * h + i] = (int8_t)moe__types_level_of(moe__levels_##table, level,   \
                                                                 MOE__OFFSET_##NAME);          \
    }
#define MOE__UNPACK_256(NAME, name, set_d, scale_, more, which, table, level)                  \
    MOE__UNPACK(name) {                                                                        \
        const int n = 256 / MOE__PER_##NAME;                                                   \
        int16_t shift[16] __attribute__((unused));                                             \
        set_d;                                                                                 \
        MOE__EACH_SCALE(out->scale, scale_);                                                   \
        MOE__PUT_##more(which)                                                                 \
        for (int h = 0; h < 16; h++) {                                                         \
            const int add = MOE__ADD_##more;                                                   \
            for (int i = 0; i < 16; i++)                                                       \
                out->q[16 * h + i] = (int8_t)(add + moe__types_level_of(                       \
                    moe__levels_##table, level, MOE__OFFSET_##NAME));                          \
        }                                                                                      \
    }
#define MOE__OF_32(NAME, name, d, d_at, table, level, at)                                      \
    MOE__UNPACK_32(NAME, name, moe__d_##d(b, MOE__ARGS d_at, k, D, out), table,                \
                   moe__w_##level(b, MOE__ARGS at, h, i))
#define MOE__OF_256(NAME, name, order, d, d_at, scale, scale_at, more, which, which_at, table, \
                    level, at)                                                                 \
    MOE__UNPACK_256(NAME, name, moe__d_##d(b, MOE__ARGS d_at, k, D, out),                      \
                    moe__s_##scale(b, MOE__ARGS scale_at, n, s), more,                         \
                    moe__s_##which(b, MOE__ARGS which_at, n, s), table,                        \
                    moe__w_##level(b, MOE__ARGS at, h, i))
#define MOE__OF_BOOKS(NAME, name, order, more)
#define MOE__OF_ROWS_32(NAME, name, d, d_at, table, level, at)                                 \
    MOE__UNPACK_32(NAME, name, moe__rd_##d(b, MOE__ARGS d_at, k, D, out), table,               \
                   moe__rw_##level(b, MOE__ARGS at, k, h, i))
#define MOE__OF_R4(NAME, name, d, d_at, scale, scale_at, more, which, which_at, table, level,  \
                   at)                                                                         \
    MOE__UNPACK_256(NAME, name, moe__rd_##d(b, MOE__ARGS d_at, k, D, out),                     \
                    moe__rs_##scale(b, MOE__ARGS scale_at, k, n, s), more,                     \
                    moe__rs_##which(b, MOE__ARGS which_at, k, n, s), table,                    \
                    moe__rw_##level(b, MOE__ARGS at, k, h, i))
#define MOE__OF_OTHER_32(NAME, name)
#define MOE__OF_OTHER_ROWS(NAME, name)
#define MOE__READ_LAYOUT(NAME, ...) MOE__LAYOUT_##NAME
MOE__BLOCK_TYPES(MOE__READ_LAYOUT)
#undef MOE__UNPACK_32
#undef MOE__UNPACK_256
#undef MOE__OF_32
#undef MOE__OF_256
#undef MOE__OF_BOOKS
#undef MOE__OF_ROWS_32
#undef MOE__OF_R4
#undef MOE__OF_OTHER_32
#undef MOE__OF_OTHER_ROWS
#undef MOE__EACH_SCALE
#undef MOE__PUT_NOTHING
#undef MOE__PUT_MINS
#undef MOE__PUT_SHIFTS
#undef MOE__ADD_NOTHING
#undef MOE__ADD_MINS
#undef MOE__ADD_SHIFTS

// ---- layouts that are written out

// In what follows e counts weights, j = e / 32, s = e / 16.
// The scale of weights 32 j .. 32 j + 31
MOE__INLINE void moe__types_scale(moe__block *out, int j, int scale) {
    out->scale[2 * j] = out->scale[2 * j + 1] = (int16_t)scale;
}

MOE__UNPACK(nvfp4) { // four E4M3 scales; per 16 weights 8 bytes of nibbles, the first 8 low
    for (int s = 0; s < 4; s++) out->d[s] = moe__types_ue4m3(b[s]), out->scale[s] = 1;
    for (int e = 0; e < 64; e++) {
        const int byte = b[4 + 8 * (e / 16) + e % 8];
        out->q[e] = moe__levels_fp4[moe__types_nibble(byte, e / 8 % 2)];
    }
}

MOE__UNPACK(iq4_xs_r8) { // scales as six of the other interleaved types; per 8 weights 32 bytes
    out->d[0] = moe__types_f16(b + 2 * k);
    for (int j = 0; j < 8; j++) {
        const int r = 8 * j + k;
        moe__types_scale(out, j, (moe__rs_nibble(b + 32, r) | moe__rs_pair(b + 16, r) << 4) - 32);
    }
    for (int u = 0; u < 32; u++)
        for (int i = 0; i < 4; i++) { // weights 8 u + i in the low nibbles, 8 u + 4 + i in the high
            const int byte = b[64 + 32 * u + 4 * k + i];
            out->q[8 * u + i] = moe__levels_k4[byte & 15];
            out->q[8 * u + 4 + i] = moe__levels_k4[byte >> 4];
        }
}

// ---- types with code books

// Eight (or four) weights are an entry of a code book, with signs from a byte of bits.
MOE__INLINE int moe__types_signed(uint64_t entry, int i, unsigned signs) {
    int x = (int8_t)(uint8_t)(entry >> 8 * i);
    return signs >> i & 1 ? -x : x;
}

MOE__UNPACK(iq2_xxs) { // d f16; per 32: four indices, then four 7-bit signs and a 4-bit scale
    const moe__books *books = moe__books_get();
    out->d[0] = moe__types_f16(b) * 0.125f; // scale: (0.5 + s) / 4 = (2 s + 1) / 8
    for (int j = 0; j < 8; j++) {
        uint32_t word = moe__load_u32(b + 6 + 8 * j);
        moe__types_scale(out, j, 2 * (int)(word >> 28) + 1);
        for (int i = 0; i < 32; i++) {
            unsigned signs = books->signs[word >> 7 * (i / 8) & 127];
            out->q[32 * j + i] =
                (int8_t)moe__types_signed(books->iq2xxs[b[2 + 8 * j + i / 8]], i % 8, signs);
        }
    }
}

// IQ2_XS and IQ2_S: 16 4-bit scales, (0.5 + s) / 4.
MOE__INLINE void moe__types_scales_iq2(const uint8_t *b, float d, moe__block *out) {
    out->d[0] = d * 0.125f;
    for (int s = 0; s < 16; s++)
        out->scale[s] = (int16_t)(2 * moe__types_nibble(b[s / 2], s % 2) + 1);
}

MOE__UNPACK(iq2_xs) { // d f16; 32 of 9 bits of index and 7 of signs; 16 4-bit scales
    const moe__books *books = moe__books_get();
    moe__types_scales_iq2(b + 66, moe__types_f16(b), out);
    for (int e = 0; e < 256; e++) {
        unsigned word = moe__load_u16(b + 2 + 2 * (e / 8));
        out->q[e] = (int8_t)moe__types_signed(books->iq2xs[word & 511], e % 8,
                                              books->signs[word >> 9]);
    }
}

MOE__UNPACK(iq2_s) { // d f16; 32 low bytes of indices; 32 sign bytes; high bits; 4-bit scales
    const moe__books *books = moe__books_get();
    moe__types_scales_iq2(b + 74, moe__types_f16(b), out);
    for (int e = 0; e < 256; e++) {
        int g = e / 8, index = b[2 + g] | (b[66 + g / 4] >> 2 * (g % 4) & 3) << 8;
        out->q[e] = (int8_t)moe__types_signed(books->iq2s[index], e % 8, b[34 + g]);
    }
}

MOE__UNPACK(iq3_xxs) { // d f16; 64 indices; per 32: four 7-bit signs and a 4-bit scale
    const moe__books *books = moe__books_get();
    out->d[0] = moe__types_f16(b) * 0.25f; // scale: (0.5 + s) / 2
    for (int j = 0; j < 8; j++) {
        uint32_t word = moe__load_u32(b + 66 + 4 * j);
        moe__types_scale(out, j, 2 * (int)(word >> 28) + 1);
        for (int i = 0; i < 32; i++) {
            unsigned signs = books->signs[word >> 7 * (i / 8) & 127];
            out->q[32 * j + i] = (int8_t)moe__types_signed(
                books->iq3xxs[b[2 + 8 * j + i / 4]], i % 4, signs >> 4 * (i / 4 % 2));
        }
    }
}

MOE__UNPACK(iq3_s) { // d f16; 64 low bytes of indices; ninth bits; 32 sign bytes; 4-bit scales
    const moe__books *books = moe__books_get();
    out->d[0] = moe__types_f16(b);
    for (int j = 0; j < 8; j++)
        moe__types_scale(out, j, 1 + 2 * moe__types_nibble(b[106 + j / 2], j % 2));
    for (int e = 0; e < 256; e++) {
        int g = e / 4, index = b[2 + g] | moe__types_bit(b[66 + g / 8], g % 8) << 8;
        unsigned signs = (unsigned)b[74 + g / 2] >> 4 * (g % 2);
        out->q[e] = (int8_t)moe__types_signed(books->iq3s[index], e % 4, signs);
    }
}

// Entries of -1, 0, 1, all moved by 1/8 up or down: eight times that are integers.
MOE__UNPACK(iq1_s) { // d f16; 32 low bytes; per 32: four times 3 high bits, scale, sign of 1/8
    const moe__books *books = moe__books_get();
    out->d[0] = moe__types_f16(b) * 0.125f;
    for (int j = 0; j < 8; j++) {
        int word = moe__load_u16(b + 34 + 2 * j), shift = word & 0x8000 ? -1 : 1;
        moe__types_scale(out, j, 2 * (word >> 12 & 7) + 1);
        for (int i = 0; i < 32; i++) {
            int index = b[2 + 4 * j + i / 8] | (word >> 3 * (i / 8) & 7) << 8;
            out->q[32 * j + i] =
                (int8_t)(moe__types_signed(books->iq1s[index], i % 8, 0) + shift);
        }
    }
}

// The 16 bits of IQ1_M's d are the top nibbles of its four words of scales.
MOE__INLINE float moe__types_iq1_m_d(const uint8_t *scales) {
    unsigned d = 0;
    for (int i = 0; i < 4; i++) d |= (unsigned)(scales[2 * i + 1] >> 4) << 4 * i;
    return moe__f16_to_f32((uint16_t)d);
}

MOE__UNPACK(iq1_m) { // 32 low bytes; nibbles of 3 high bits and sign of 1/8; 3-bit scales and d
    const moe__books *books = moe__books_get();
    out->d[0] = moe__types_iq1_m_d(b + 48) * 0.125f;
    for (int s = 0; s < 16; s++) {
        int scale = moe__load_u16(b + 48 + 2 * (s / 4)) >> 3 * (s % 4) & 7;
        out->scale[s] = (int16_t)(2 * scale + 1);
    }
    for (int e = 0; e < 256; e++) {
        int g = e / 8, high = moe__types_nibble(b[32 + g / 2], g % 2);
        out->q[e] = (int8_t)(moe__types_signed(books->iq1s[b[g] | (high & 7) << 8], e % 8, 0) +
                             (high & 8 ? -1 : 1));
    }
}

#undef MOE__UNPACK

// ---- dequantize, dot -------------------------------------------------------------------------

typedef struct moe__type {
    moe_type id;
    const char *name;
    int32_t block, bytes; // weights and bytes per block, of one row
    moe__act_kind act;    // what it is multiplied with
    int32_t rows, meta;   // rows interleaved in a group; bytes of a row's scale before blocks
    int32_t per, bits, offset; // see MOE__ALL_TYPES
    void (*unpack)(const uint8_t *b, int k, float D, moe__block *out); // NULL: plain floats
    void (*quantize)(const float *x, uint8_t *row, int64_t n, const float *importance);
} moe__type;

// A group of rows that are read block by block.
typedef struct moe__group {
    const moe__type *type;
    const uint8_t *at; // the next block of the group
    float scale[MOE__GROUP_ROWS];
} moe__group;

MOE__PRIVATE moe__group moe__group_begin(const moe__type *type, const uint8_t *rows) {
    moe__group group;
    group.type = type;
    for (int k = 0; k < MOE__GROUP_ROWS; k++) group.scale[k] = 1;
    for (int k = 0; k < type->rows; k++, rows += type->meta) {
        if (type->meta == 2) group.scale[k] = moe__types_f16(rows);
        if (type->meta == 4) group.scale[k] = moe__load_f32(rows);
    }
    group.at = rows;
    return group;
}

// Row k of the next block; the mins of types without are 0.
MOE__INLINE void moe__group_unpack(const moe__group *group, int k, moe__block *out) {
    memset(out->min, 0, sizeof out->min);
    memset(out->dmin, 0, sizeof out->dmin);
    group->type->unpack(group->at, k, group->scale[k], out);
}

// Weights 16 s .. 16 s + 15 of an unpacked block are scale * q - min.
MOE__INLINE float moe__block_scale(const moe__type *type, const moe__block *block, int s) {
    return block->d[type->act == MOE__ACT_Q32 ? s : 0] * (float)block->scale[s];
}
MOE__INLINE float moe__block_min(const moe__type *type, const moe__block *block, int s) {
    return block->dmin[type->act == MOE__ACT_Q32 ? s : 0] * (float)block->min[s];
}

// What the levels of IQ6_K stand for before they are rounded to integers: products use the
// rounded ones, as the program that makes such files does.
MOE__PRIVATE void moe__types_exact_iq6_k(const uint8_t *b, const moe__block *block, float *out) {
    for (int h = 0; h < 16; h++) {
        const float d = block->d[0] * (float)block->scale[h];
        const float shift = (float)moe__s_bits(b, 2, MOE__SHIFT_K6, 16, h);
        for (int i = 0; i < 16; i++) {
            const float q = (float)moe__w_six(b, 20, 148, h, i);
            const float v = fmaf(q, fmaf(q, fmaf(q, 0.0011972f, -0.11218f), 6.2568f), -127.0f);
            out[16 * h + i] = d * (v + shift);
        }
    }
}

// One group of rows of n weights to floats, row after row. A product of an f16 scale (11 bits),
// a block scale and a level (at most 8 each) is rounded once; so every instruction set and every
// compiler, fused operations or not, gives the same bits.
MOE__PRIVATE void moe__types_dequantize(const moe__type *type, const uint8_t *rows, int64_t n,
                                        float *out) {
    moe__group group = moe__group_begin(type, rows);
    moe__block block;
    for (int64_t at = 0; at < n; at += type->block, group.at += type->rows * type->bytes)
        for (int k = 0; k < type->rows; k++) {
            moe__group_unpack(&group, k, &block);
            for (int e = 0; e < type->block; e++)
                out[k * n + at + e] = moe__block_scale(type, &block, e / 16) * (float)block.q[e] -
                                      moe__block_min(type, &block, e / 16);
            if (type->id == MOE_TYPE_IQ6_K) moe__types_exact_iq6_k(group.at, &block, out + at);
        }
}

// ---- the product of quantized rows with activations

// There is one arithmetic, and every kernel on every instruction set computes it bit by bit, for
// one vector or many: integers are summed exactly, floats in one order. Per 256 weights
//
//   ACT_Q256   sum += d_act * (d * int(sum of scale q a) - dmin * int(sum of min a))
//   ACT_Q32    for each scale i: s[i % 4] += (d * int(sum of q a)) * d_act,
//                                s[i % 4] -= dmin * (d_act * int(sum of a))
//              sum = (s[0] + s[2]) + (s[1] + s[3]), s of all weights
//
// where int(...) is an int32, rounded to float, and each operation of floats is rounded as
// moe__dot_256 and moe__dot_32 write it. No int32 can overflow: 256 * 128 * 127 * 128 < 2^30.

// sum + a block of 256 weights times a record of activations
MOE__INLINE float moe__dot_256(const moe__block *block, const moe__act256 *a, float sum) {
    int32_t product = 0, min = 0;
    for (int s = 0; s < 16; s++) {
        int32_t part = 0;
        const int8_t *q = a->q + moe__act256_at(16 * s);
        for (int e = 0; e < 16; e++) part += block->q[16 * s + e] * q[e];
        product += block->scale[s] * part;
        min += block->min[s] * a->sum16[s];
    }
    float x = moe__rounded_f32((float)product * block->d[0]);
    x = fmaf(-(float)min, block->dmin[0], x);
    return fmaf(x, a->d, sum);
}

// sum[4] += n weights times activations, of which `at` is the first in a record
MOE__INLINE void moe__dot_32(const moe__type *type, const moe__block *block, int n,
                             const moe__act32 *a, int at, float sum[4]) {
    const int per = type->per;
    for (int s = 0; s < n / per; s++, at += per) {
        int32_t product = 0, act_sum = 0;
        for (int e = 0; e < per; e++) {
            const int q = a->q[moe__act32_at(at + e)];
            product += block->q[per * s + e] * q;
            act_sum += q;
        }
        const float d_act = a->d[at / 32];
        const float x = moe__rounded_f32((float)product * block->d[per / 16 * s]);
        float *to = &sum[at / per % 4];
        *to = fmaf(x, d_act, *to);
        if (!type->offset)
            *to = fmaf(-block->dmin[per / 16 * s], moe__rounded_f32((float)act_sum * d_act), *to);
    }
}

// ---- activations to int8 ---------------------------------------------------------------------

// x to the nearest even integer, |x| < 2^31: adding 1.5 * 2^52 leaves it in the low mantissa
// bits. The sum is a double so that no compiler fuses it with the f32 product that x comes from,
// which would round once instead of twice. Any other x gives some integer.
MOE__INLINE int32_t moe__types_round(float x) {
    double shifted = (double)x + 6755399441055744.0;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (int32_t)(uint32_t)bits;
}

// Quantizes n values with one scale, which is returned. Values whose magnitudes are all below
// 2^-120 count as 0: from there on 127 / peak would not be finite. NaN or infinity: NaN and q =
// 0.
MOE__INLINE float moe__types_quantize_act(const float *x, int n, int8_t *q) {
    uint32_t peak_bits = 0; // magnitudes are ordered like their bits, NaN above all
    for (int i = 0; i < n; i++) {
        uint32_t bits = moe__f32_bits(x[i]) & 0x7FFFFFFF;
        if (bits > peak_bits) peak_bits = bits;
    }
    if (peak_bits >= 0x7F800000 || peak_bits < 0x03800000) {
        memset(q, 0, (size_t)n);
        return moe__f32_from_bits(peak_bits >= 0x7F800000 ? 0x7FC00000 : 0);
    }
    float peak = moe__f32_from_bits(peak_bits), inverse = 127.0f / peak;
    for (int i = 0; i < n; i++) q[i] = (int8_t)moe__types_round(x[i] * inverse);
    return peak / 127.0f;
}

MOE__PRIVATE void moe__quantize_act_f32(const float *x, int64_t n, void *act) {
    memcpy(act, x, (size_t)n * sizeof(float));
}

MOE__PRIVATE void moe__quantize_act_q32(const float *x, int64_t n, void *act) {
    moe__act32 *record = (moe__act32 *)act;
    for (; n > 0; n -= 256, x += 256, record++) {
        memset(record, 0, sizeof *record);
        for (int j = 0; j < (int)moe__min(n / 32, 8); j++) {
            int8_t q[32];
            record->d[j] = moe__types_quantize_act(x + 32 * j, 32, q);
            for (int i = 0; i < 32; i++) {
                record->q[moe__act32_at(32 * j + i)] = q[i];
                record->nsum[j] -= q[i];
            }
        }
    }
}

MOE__PRIVATE void moe__quantize_act_q256(const float *x, int64_t n, void *act) {
    moe__act256 *record = (moe__act256 *)act;
    for (; n > 0; n -= 256, x += 256, record++) {
        memset(record, 0, sizeof *record);
        int8_t q[256];
        record->d = moe__types_quantize_act(x, 256, q);
        for (int j = 0; j < 16; j++) {
            int sum = 0;
            for (int i = 0; i < 16; i++) sum += q[16 * j + i];
            memcpy(record->q + moe__act256_at(16 * j), q + 16 * j, 16);
            record->nsum[j] = -sum;
            record->sum16[j] = (int16_t)sum;
            record->sum32[j / 2] = (int16_t)(record->sum32[j / 2] + sum);
        }
    }
}

// ---- plain floats ----------------------------------------------------------------------------

MOE__PRIVATE void moe__dequantize_f32(const uint8_t *row, int64_t n, float *out) {
    memcpy(out, row, (size_t)n * sizeof(float));
}

MOE__PRIVATE void moe__dequantize_f16(const uint8_t *row, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = moe__types_f16(row + 2 * i);
}

MOE__PRIVATE void moe__dequantize_bf16(const uint8_t *row, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = moe__types_bf16(row + 2 * i);
}

// Row times activations: four sums, for weights i, i + 1, i + 2 and i + 3 of every four.
#define MOE__TYPES_ROW_FLOAT(name, size, load)                                                 \
    MOE__INLINE double moe__types_row_##name(const uint8_t *row, int64_t n, const void *act) { \
        const float *x = (const float *)act;                                                   \
        double sum[4] = {0, 0, 0, 0};                                                          \
        int64_t i = 0;                                                                         \
        for (; i + 4 <= n; i += 4)                                                             \
            for (int j = 0; j < 4; j++)                                                        \
                sum[j] += (double)load(row + size * (i + j)) * (double)x[i + j];               \
        for (; i < n; i++) sum[i & 3] += (double)load(row + size * i) * (double)x[i];          \
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);                                          \
    }
MOE__TYPES_ROW_FLOAT(f32, 4, moe__load_f32)
MOE__TYPES_ROW_FLOAT(f16, 2, moe__types_f16)
MOE__TYPES_ROW_FLOAT(bf16, 2, moe__types_bf16)
#undef MOE__TYPES_ROW_FLOAT

// ---- quantize --------------------------------------------------------------------------------

// Quantizers of blocks minimise the weighted squared error sum(w (x - y)^2), w = importance or
// 1. As a function of the scale it has many local minima. So: the levels that each of several
// scales gives, the best scale for these levels by least squares, the levels again; the best of
// all is kept. Scales that are stored as integers are chosen last, among neighbours, by the
// error they cause. Sums are doubles and values at most 2^30: nothing overflows. What follows is
// written for columns of a block: x the values, w their weights, both from moe__types_load.

enum {
    MOE__TYPES_SCALES = 10, // scales tried for y = scale * level
    MOE__TYPES_LINES = 7,   // scales tried for y = scale * level - min
    MOE__TYPES_ROUNDS = 2   // times that a block's f16 scales are fitted again
};
// Ranges below 2^-26 are 0 to all types: the smallest f16 is 2^-24, half of it rounds to 0.
#define MOE__TYPES_TINY (1 / 67108864.0f)

MOE__INLINE int moe__types_is_finite(float x) {
    return (moe__f32_bits(x) & 0x7F800000) != 0x7F800000;
}

// x to the nearest level; the first or last if it lies beyond; the first for NaN.
MOE__INLINE int32_t moe__types_level(float x, int32_t first, int32_t last) {
    float low = x > (float)first ? x : (float)first;
    return moe__types_round(low < (float)last ? low : (float)last);
}

// A scale as it will be stored: the nearest finite f16. Below 2^-14, where f16 has few bits
// left, the next larger one: a smaller one would clip the largest values by much.
MOE__INLINE float moe__types_round_f16(float x) {
    uint16_t bits = moe__f32_to_f16(fabsf(x));
    if (bits < 0x0400 && moe__f16_to_f32(bits) < fabsf(x)) bits++;
    if (bits > 0x7BFF) bits = 0x7BFF; // 65504
    return x < 0 ? -moe__f16_to_f32(bits) : moe__f16_to_f32(bits);
}

// A block's values and weights. NaN and infinity count as 0; beyond 2^30 is more than any type
// can hold. Only the ratio of weights matters: they are brought to 0..1. The floor under them
// lets columns of importance 0 break ties, and decide if there are no others.
MOE__PRIVATE void moe__types_load(const float *in, const float *importance, int n, float *x,
                                  float *w) {
    const float limit = 1073741824.0f;
    float most = 0;
    for (int i = 0; i < n; i++) {
        x[i] = !moe__types_is_finite(in[i]) ? 0 : in[i] > limit ? limit : in[i];
        if (x[i] < -limit) x[i] = -limit;
        w[i] = 1;
        if (!importance) continue;
        w[i] = importance[i] > 0 && moe__types_is_finite(importance[i]) ? importance[i] : 0;
        if (w[i] > most) most = w[i];
    }
    if (!importance) return;
    for (int i = 0; i < n; i++) w[i] = (most > 0 ? w[i] / most : 0) + 1e-6f;
}

MOE__PRIVATE void moe__quantize_f32(const float *x, uint8_t *row, int64_t n,
                                    const float *importance) {
    (void)importance;
    memcpy(row, x, (size_t)n * sizeof(float));
}

MOE__PRIVATE void moe__quantize_f16(const float *x, uint8_t *row, int64_t n,
                                    const float *importance) {
    (void)importance;
    for (int64_t i = 0; i < n; i++) moe__store_u16(row + 2 * i, moe__f32_to_f16(x[i]));
}

MOE__PRIVATE void moe__quantize_bf16(const float *x, uint8_t *row, int64_t n,
                                     const float *importance) {
    (void)importance;
    for (int64_t i = 0; i < n; i++) moe__store_u16(row + 2 * i, moe__f32_to_bf16(x[i]));
}

// 255 levels leave nothing to search for: the largest value makes the scale, whatever its
// weight.
MOE__PRIVATE void moe__quantize_q8_0(const float *in, uint8_t *row, int64_t n,
                                     const float *importance) {
    enum { BLOCK = MOE__BLOCK_Q8_0 };
    float x[BLOCK], w[BLOCK];
    (void)importance;
    for (; n > 0; n -= BLOCK, in += BLOCK, row += MOE__BYTES_Q8_0) {
        float peak = 0;
        moe__types_load(in, NULL, BLOCK, x, w);
        for (int i = 0; i < BLOCK; i++)
            if (fabsf(x[i]) > peak) peak = fabsf(x[i]);
        float d = moe__types_round_f16(peak / 127), inverse = d > 0 ? 1 / d : 0;
        moe__store_u16(row, moe__f32_to_f16(d));
        for (int i = 0; i < BLOCK; i++)
            row[2 + i] = (uint8_t)moe__types_level(x[i] * inverse, -127, 127);
    }
}

// ---- quantize: y = scale * level - min -------------------------------------------------------

typedef enum moe__types_mins {
    MOE__TYPES_NO_MIN, // min = 0; the scale may be negative
    MOE__TYPES_MIN,    // min >= 0, scale >= 0
    MOE__TYPES_ANY_MIN // scale >= 0; what is stored is -min, as f16
} moe__types_mins;

struct moe__types_draft;

// What a type can hold: codes 0, 1, .. stand for the levels first .. last, or for those of an
// ascending table of 16 from first to last. Each `width` weights have a scale (and a min) of
// their own: an f16 if width = block, else an integer times the block's f16.
typedef struct moe__types_form {
    const int8_t *table; // or NULL
    int32_t first, last, width;
    moe__types_mins mins;
    int32_t scale_first, scale_last; // integer scales; integer mins are 0 .. scale_last
    int32_t block, bytes;            // as in the type table
    void (*pack)(const struct moe__types_draft *draft, uint8_t *row);
} moe__types_form;

typedef struct moe__types_line {
    float scale, min;
} moe__types_line;

// A block in the making.
typedef struct moe__types_draft {
    const moe__types_form *form;
    float d, dmin; // as stored
    int8_t scale[16], min[16];
    uint8_t code[256];
    double error;
} moe__types_draft;

MOE__INLINE int32_t moe__types_value(const moe__types_form *f, int32_t code) {
    return f->table ? f->table[code] : f->first + code;
}

// The code whose level is nearest to x.
MOE__INLINE int32_t moe__types_code(const moe__types_form *f, float x) {
    int32_t code = 0;
    if (!f->table) return moe__types_level(x, f->first, f->last) - f->first;
    for (int32_t step = 8; step > 0; step /= 2)
        code += step * (2 * x > (float)(f->table[code + step - 1] + f->table[code + step]));
    return code;
}

MOE__INLINE void moe__types_codes(const moe__types_form *f, const float *x, moe__types_line line,
                                  uint8_t *code) {
    float inverse = line.scale != 0 ? 1 / line.scale : 0;
    for (int i = 0; i < f->width; i++)
        code[i] = (uint8_t)moe__types_code(f, (x[i] + line.min) * inverse);
}

MOE__PRIVATE double moe__types_error(const moe__types_form *f, const float *x, const float *w,
                                     moe__types_line line) {
    float inverse = line.scale != 0 ? 1 / line.scale : 0;
    double error = 0;
    for (int i = 0; i < f->width; i++) {
        int32_t level = moe__types_value(f, moe__types_code(f, (x[i] + line.min) * inverse));
        float e = x[i] - (line.scale * (float)level - line.min);
        error += (double)w[i] * e * e;
    }
    return error;
}

// The best line for the levels that `line` gives: two normal equations, or one if there is no
// min or it would be negative.
MOE__PRIVATE moe__types_line moe__types_refit(const moe__types_form *f, const float *x,
                                              const float *w, moe__types_line line) {
    float inverse = 1 / line.scale;
    double sw = 0, sx = 0, sq = 0, sqq = 0, sxq = 0, scale = 0, min = 0;
    for (int i = 0; i < f->width; i++) {
        int32_t q = moe__types_value(f, moe__types_code(f, (x[i] + line.min) * inverse));
        double wq = (double)w[i] * q;
        sw += w[i];
        sx += (double)w[i] * x[i];
        sq += wq;
        sqq += wq * q;
        sxq += wq * x[i];
    }
    if (f->mins) {
        double determinant = sw * sqq - sq * sq;
        if (!(determinant > 1e-9 * sw * sqq)) return line; // all levels are the same
        scale = (sw * sxq - sx * sq) / determinant;
        min = (sq * sxq - sqq * sx) / determinant;
    }
    if (!f->mins || (f->mins == MOE__TYPES_MIN && min < 0)) {
        scale = sqq > 0 ? sxq / sqq : 0;
        min = 0;
    }
    if ((f->mins ? scale : fabs(scale)) > 1e-12) {
        line.scale = (float)scale;
        line.min = (float)min;
    }
    return line;
}

// A good line: constant, or from lines that put the largest magnitude up to one step before or
// behind the first or the last level; with mins, from lines that begin at the smallest value and
// reach the largest one up to one level before or two behind the last.
MOE__PRIVATE moe__types_line moe__types_fit(const moe__types_form *f, const float *x,
                                            const float *w) {
    moe__types_line best = {0, 0}, line;
    float low = x[0], high = x[0], range, min = 0;
    for (int i = 1; i < f->width; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > high) high = x[i];
    }
    if (f->mins) {
        min = best.min = f->mins == MOE__TYPES_MIN && low > 0 ? 0 : -low;
        range = high + min;
    } else {
        range = high > -low ? high : low;
    }
    if (fabsf(range) < MOE__TYPES_TINY) return best;
    float step = f->table ? (float)(f->last - f->first) / 15 : 1;
    double least = moe__types_error(f, x, w, best);
    for (int i = 0; i < (f->mins ? MOE__TYPES_LINES : MOE__TYPES_SCALES); i++) {
        float level = (float)(i % 2 ? f->last : f->first) + 0.5f * step * (float)(i / 2 - 2);
        if (f->mins) level = (float)f->last - 1 + 0.5f * (float)i;
        line.scale = range / level;
        line.min = min;
        line = moe__types_refit(f, x, w, line);
        if (f->mins == MOE__TYPES_ANY_MIN) line = moe__types_refit(f, x, w, line);
        double error = moe__types_error(f, x, w, line);
        if (error < least) {
            least = error;
            best = line;
        }
    }
    return best;
}

// The best of the integer scales (and mins) around what the j-th `width` weights want.
MOE__PRIVATE void moe__types_choose(const moe__types_form *f, const float *x, const float *w,
                                    moe__types_line wanted, moe__types_draft *draft, int j) {
    int32_t s0 = f->scale_first, s1 = f->scale_last, reach = f->mins ? 1 : 0;
    int32_t scale = draft->d != 0 ? moe__types_level(wanted.scale / draft->d, s0, s1) : 0;
    int32_t min = draft->dmin > 0 ? moe__types_level(wanted.min / draft->dmin, 0, s1) : 0;
    double least = INFINITY;
    moe__types_line line, best = {0, 0};
    for (int32_t s = scale - 1; s <= scale + 1; s++) {
        for (int32_t m = min - reach; m <= min + reach; m++) {
            if (s < s0 || s > s1 || m < 0 || m > s1) continue;
            line.scale = draft->d * (float)s;
            line.min = draft->dmin * (float)m;
            double error = moe__types_error(f, x, w, line);
            if (!(error < least)) continue;
            least = error;
            best = line;
            draft->scale[j] = (int8_t)s;
            draft->min[j] = (int8_t)m;
        }
    }
    draft->error += least;
    moe__types_codes(f, x, best, draft->code + j * f->width);
}

// The best d and dmin for the block's scales, mins and levels: y = d * a - dmin * b.
MOE__PRIVATE void moe__types_refit_block(const moe__types_form *f, const float *x, const float *w,
                                         moe__types_draft *draft) {
    double xa = 0, xb = 0, aa = 0, ab = 0, bb = 0;
    for (int i = 0; i < 256; i++) {
        double a = draft->scale[i / f->width] * moe__types_value(f, draft->code[i]);
        double b = draft->min[i / f->width], wa = w[i] * a, wb = w[i] * b;
        xa += x[i] * wa;
        xb += x[i] * wb;
        aa += wa * a;
        ab += wa * b;
        bb += wb * b;
    }
    double determinant = aa * bb - ab * ab, d = 0, dmin = 0;
    if (determinant > 1e-9 * aa * bb) {
        d = (bb * xa - ab * xb) / determinant;
        dmin = (ab * xa - aa * xb) / determinant;
    } else if (aa > 0) {
        d = xa / aa; // no mins
    }
    if (f->mins ? !(d > 0 && dmin >= 0) : d == 0) return;
    draft->d = moe__types_round_f16((float)d);
    draft->dmin = moe__types_round_f16((float)dmin);
}

// At first the largest scale and min become the largest integers.
MOE__PRIVATE void moe__types_fit_block(const moe__types_form *f, const float *x, const float *w,
                                       moe__types_draft *best) {
    moe__types_draft draft;
    moe__types_line wanted[16];
    float scale = 0, min = 0;
    memset(&draft, 0, sizeof draft);
    draft.form = f;
    for (int j = 0; j < 256 / f->width; j++) {
        wanted[j] = moe__types_fit(f, x + j * f->width, w + j * f->width);
        if (fabsf(wanted[j].scale) > fabsf(scale)) scale = wanted[j].scale;
        if (wanted[j].min > min) min = wanted[j].min;
    }
    draft.d = moe__types_round_f16(scale / (float)(f->mins ? f->scale_last : f->scale_first));
    draft.dmin = moe__types_round_f16(min / (float)f->scale_last);
    for (int round = 0; round <= MOE__TYPES_ROUNDS; round++) {
        if (round) moe__types_refit_block(f, x, w, &draft);
        draft.error = 0;
        for (int j = 0; j < 256 / f->width; j++)
            moe__types_choose(f, x + j * f->width, w + j * f->width, wanted[j], &draft, j);
        if (round == 0 || draft.error < best->error) *best = draft;
    }
}

MOE__PRIVATE void moe__types_quantize(const moe__types_form *f, const float *in, uint8_t *row,
                                      int64_t n, const float *importance) {
    float x[256], w[256];
    moe__types_draft draft;
    for (int64_t begin = 0; begin < n; begin += f->block, row += f->bytes) {
        moe__types_load(in + begin, importance ? importance + begin : NULL, f->block, x, w);
        if (f->width < f->block) {
            moe__types_fit_block(f, x, w, &draft);
        } else {
            moe__types_line line = moe__types_fit(f, x, w);
            draft.form = f;
            line.scale = draft.d = moe__types_round_f16(line.scale);
            line.min = draft.dmin = moe__types_round_f16(line.min);
            moe__types_codes(f, x, line, draft.code);
        }
        f->pack(&draft, row);
    }
}

// ---- quantize: bits --------------------------------------------------------------------------

MOE__INLINE void moe__types_store_f16(uint8_t *p, float x) {
    moe__store_u16(p, moe__f32_to_f16(x));
}

// The low four bits of n codes: `half` bytes for each 2 * half codes, first half low.
MOE__INLINE void moe__types_store_low(const uint8_t *code, int n, int half, uint8_t *out) {
    for (int i = 0; i < n / 2; i++, out++) {
        const uint8_t *q = code + i / half * half + i;
        *out = (uint8_t)((q[0] & 15) | (q[half] & 15) << 4);
    }
}

// 32 weights: d, maybe -min, maybe the fifth bits, the low bits.
MOE__PRIVATE void moe__types_pack_32(const moe__types_draft *draft, uint8_t *row) {
    const moe__types_form *f = draft->form;
    uint32_t high = 0;
    for (int i = 0; i < 32; i++) high |= (uint32_t)(draft->code[i] >> 4) << i;
    moe__types_store_f16(row, draft->d);
    if (f->mins) moe__types_store_f16(row + 2, -draft->dmin);
    if (f->bytes > 20) memcpy(row + f->bytes - 20, &high, 4);
    moe__types_store_low(draft->code, 32, 16, row + f->bytes - 16);
}

MOE__PRIVATE void moe__types_pack_q2_k(const moe__types_draft *draft, uint8_t *row) {
    for (int j = 0; j < 16; j++) row[j] = (uint8_t)(draft->scale[j] | draft->min[j] << 4);
    for (int i = 0; i < 64; i++) {
        const uint8_t *q = draft->code + i / 32 * 128 + i % 32;
        row[16 + i] = (uint8_t)(q[0] | q[32] << 2 | q[64] << 4 | q[96] << 6);
    }
    moe__types_store_f16(row + 80, draft->d);
    moe__types_store_f16(row + 82, draft->dmin);
}

MOE__PRIVATE void moe__types_pack_q3_k(const moe__types_draft *draft, uint8_t *row) {
    memset(row, 0, 108);
    for (int i = 0; i < 256; i++) {
        row[i % 32] |= (uint8_t)(draft->code[i] >> 2 << i / 32);
        row[32 + i / 128 * 32 + i % 32] |= (uint8_t)((draft->code[i] & 3) << i % 128 / 32 * 2);
    }
    for (int j = 0; j < 16; j++) {
        int scale = draft->scale[j] + 32;
        row[96 + j % 8] |= (uint8_t)((scale & 15) << j / 8 * 4);
        row[104 + j % 4] |= (uint8_t)(scale >> 4 << j / 4 * 2);
    }
    moe__types_store_f16(row + 108, draft->d);
}

// Q4_K and Q5_K.
MOE__PRIVATE void moe__types_pack_q4_k(const moe__types_draft *draft, uint8_t *row) {
    uint8_t *packed = row + 4;
    moe__types_store_f16(row, draft->d);
    moe__types_store_f16(row + 2, draft->dmin);
    for (int j = 0; j < 4; j++) {
        packed[j] = (uint8_t)(draft->scale[j] | draft->scale[4 + j] >> 4 << 6);
        packed[4 + j] = (uint8_t)(draft->min[j] | draft->min[4 + j] >> 4 << 6);
        packed[8 + j] = (uint8_t)((draft->scale[4 + j] & 15) | (draft->min[4 + j] & 15) << 4);
    }
    memset(row + 16, 0, 32); // the fifth bits of Q5_K
    for (int i = 0; i < 256; i++) row[16 + i % 32] |= (uint8_t)(draft->code[i] >> 4 << i / 32);
    moe__types_store_low(draft->code, 256, 32, row + draft->form->bytes - 128);
}

MOE__PRIVATE void moe__types_pack_q6_k(const moe__types_draft *draft, uint8_t *row) {
    for (int half = 0; half < 2; half++) {
        const uint8_t *q = draft->code + 128 * half;
        moe__types_store_low(q, 128, 64, row + 64 * half);
        for (int i = 0; i < 32; i++)
            row[128 + 32 * half + i] = (uint8_t)(q[i] >> 4 | q[32 + i] >> 4 << 2 |
                                                 q[64 + i] >> 4 << 4 | q[96 + i] >> 4 << 6);
    }
    memcpy(row + 192, draft->scale, 16);
    moe__types_store_f16(row + 208, draft->d);
}

MOE__PRIVATE void moe__types_pack_iq4_xs(const moe__types_draft *draft, uint8_t *row) {
    moe__types_store_f16(row, draft->d);
    memset(row + 2, 0, 6);
    for (int j = 0; j < 8; j++) {
        int scale = draft->scale[j] + 32;
        row[2 + j / 4] |= (uint8_t)(scale >> 4 << j % 4 * 2);
        row[4 + j / 2] |= (uint8_t)((scale & 15) << j % 2 * 4);
    }
    moe__types_store_low(draft->code, 256, 16, row + 8);
}

// How a type is packed, its levels, mins, integer scales. Levels are those of a table, or all
// integers that the type has.
#define MOE__TYPES_QUANTIZE(NAME, name, pack, table, first, last, mins, s0, s1)                   \
    MOE__PRIVATE void moe__quantize_##name(const float *in, uint8_t *row, int64_t n,              \
                                           const float *importance) {                             \
        static const moe__types_form form = {table, first, last, MOE__PER_##NAME,                 \
                                             MOE__TYPES_##mins, s0, s1, MOE__BLOCK_##NAME,        \
                                             MOE__BYTES_##NAME, moe__types_pack_##pack};          \
        moe__types_quantize(&form, in, row, n, importance);                                       \
    }
#define MOE__TYPES_QUANTIZE_EVEN(NAME, name, pack, mins, s0, s1)                                  \
    MOE__TYPES_QUANTIZE(NAME, name, pack, NULL, -MOE__OFFSET_##NAME,                              \
                        (1 << MOE__BITS_##NAME) - 1 - MOE__OFFSET_##NAME, mins, s0, s1)
MOE__TYPES_QUANTIZE_EVEN(Q4_0, q4_0, 32, NO_MIN, 0, 0)
MOE__TYPES_QUANTIZE_EVEN(Q4_1, q4_1, 32, ANY_MIN, 0, 0)
MOE__TYPES_QUANTIZE_EVEN(Q5_0, q5_0, 32, NO_MIN, 0, 0)
MOE__TYPES_QUANTIZE_EVEN(Q5_1, q5_1, 32, ANY_MIN, 0, 0)
MOE__TYPES_QUANTIZE(IQ4_NL, iq4_nl, 32, moe__levels_k4, -127, 113, NO_MIN, 0, 0)
MOE__TYPES_QUANTIZE_EVEN(Q2_K, q2_k, q2_k, MIN, 0, 15)
MOE__TYPES_QUANTIZE_EVEN(Q3_K, q3_k, q3_k, NO_MIN, -32, 31)
MOE__TYPES_QUANTIZE_EVEN(Q4_K, q4_k, q4_k, MIN, 0, 63)
MOE__TYPES_QUANTIZE_EVEN(Q5_K, q5_k, q4_k, MIN, 0, 63)
MOE__TYPES_QUANTIZE_EVEN(Q6_K, q6_k, q6_k, NO_MIN, -128, 127)
MOE__TYPES_QUANTIZE(IQ4_XS, iq4_xs, iq4_xs, moe__levels_k4, -127, 113, NO_MIN, -32, 31)
#undef MOE__TYPES_QUANTIZE_EVEN
#undef MOE__TYPES_QUANTIZE

// One exponent per 32 weights: the largest magnitude lies between levels 8 and 16, or up to a
// factor of 2 off that.
MOE__PRIVATE void moe__quantize_mxfp4(const float *in, uint8_t *row, int64_t n,
                                      const float *importance) {
    static const int8_t levels[16] = {-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12};
    enum { BLOCK = MOE__BLOCK_MXFP4, BYTES = MOE__BYTES_MXFP4 };
    static const moe__types_form form = {levels, -12, 12, BLOCK, MOE__TYPES_NO_MIN, 0, 0,
                                         BLOCK, BYTES, NULL};
    float x[BLOCK], w[BLOCK];
    uint8_t code[BLOCK];
    for (int64_t begin = 0; begin < n; begin += BLOCK, row += BYTES) {
        uint32_t peak = 0, best = 2;
        double least = INFINITY;
        moe__types_line line = {0, 0};
        moe__types_load(in + begin, importance ? importance + begin : NULL, BLOCK, x, w);
        for (int i = 0; i < BLOCK; i++)
            if (moe__f32_bits(fabsf(x[i])) > peak) peak = moe__f32_bits(fabsf(x[i]));
        uint32_t e0 = peak >> 23 > 5 ? (peak >> 23) - 3 : 2;
        for (uint32_t e = e0; e <= e0 + 2; e++) {
            line.scale = moe__f32_from_bits((e - 1) << 23);
            double error = moe__types_error(&form, x, w, line);
            if (error < least) {
                least = error;
                best = e;
            }
        }
        line.scale = moe__f32_from_bits((best - 1) << 23);
        moe__types_codes(&form, x, line, code);
        for (int i = 0; i < BLOCK; i++) // 8 .. 15 are the negative levels, -0 is not used
            code[i] = (uint8_t)(code[i] > 7 ? code[i] - 8 : code[i] < 7 ? 15 - code[i] : 0);
        row[0] = (uint8_t)best;
        moe__types_store_low(code, BLOCK, BLOCK / 2, row + 1);
    }
}

// ---- the table -------------------------------------------------------------------------------

#define MOE__UNPACKER_F32(name) NULL
#define MOE__UNPACKER_Q32(name) moe__unpack_##name
#define MOE__UNPACKER_Q256(name) moe__unpack_##name
#define MOE__QUANTIZER_0(name) NULL
#define MOE__QUANTIZER_1(name) moe__quantize_##name
#define MOE__TYPES_ENTRY(NAME, name, id, block, bytes, act, rows, meta, per, bits, offset, q, ...) \
    {MOE_TYPE_##NAME, #NAME, block, bytes, MOE__ACT_##act, rows, meta, per, bits, offset,      \
     MOE__UNPACKER_##act(name), MOE__QUANTIZER_##q(name)},
static const moe__type moe__types[MOE__N_TYPES] = {MOE__TYPES(MOE__TYPES_ENTRY)};
#undef MOE__TYPES_ENTRY
#undef MOE__QUANTIZER_0
#undef MOE__QUANTIZER_1
#undef MOE__UNPACKER_F32
#undef MOE__UNPACKER_Q32
#undef MOE__UNPACKER_Q256

// NULL if models with this type cannot be run. The entry's place in the table is its index in
// kernel tables.
MOE__PRIVATE const moe__type *moe__type_find(moe_type id) {
    for (int i = 0; i < MOE__N_TYPES; i++)
        if (moe__types[i].id == id) return &moe__types[i];
    return NULL;
}

// A group of rows (one row of most types) to floats, plain C, any type.
MOE__PRIVATE void moe__type_to_f32(const moe__type *type, const uint8_t *rows, int64_t n,
                                   float *out) {
    if (type->unpack) moe__types_dequantize(type, rows, n, out);
    else if (type->id == MOE_TYPE_F32) moe__dequantize_f32(rows, n, out);
    else if (type->id == MOE_TYPE_F16) moe__dequantize_f16(rows, n, out);
    else moe__dequantize_bf16(rows, n, out);
}

// ---- public ----------------------------------------------------------------------------------

MOE_API const char *moe_type_name(moe_type type) {
    const moe__gguf_type *info = moe__gguf_type_info((int32_t)type);
    return info ? info->name : "?";
}

MOE_API int moe_type_supported(moe_type type) { return moe__type_find(type) != NULL; }

MOE_API int32_t moe_type_block(moe_type type) {
    const moe__gguf_type *info = moe__gguf_type_info((int32_t)type);
    return info ? info->block : 0;
}

MOE_API size_t moe_type_row_size(moe_type type, int64_t n) {
    const moe__gguf_type *info = moe__gguf_type_info((int32_t)type);
    uint64_t size;
    if (!info || info->bytes == 0 || n <= 0 || n % info->block != 0) return 0;
    if (!moe__size_mul((uint64_t)(n / info->block), (uint64_t)info->bytes, &size) ||
        !moe__size_add(size, (uint64_t)info->meta, &size) || size > SIZE_MAX / 2)
        return 0;
    return (size_t)size;
}

// What moe_type_dequantize and _quantize share: `from` and `to` are the names of in and out.
MOE__PRIVATE moe_status moe__types_check(moe_type type, const void *in, const char *from,
                                         const void *out, const char *to, int64_t n_rows,
                                         int64_t n, moe_error *error) {
    const moe__type *t = moe__type_find(type);
    size_t row_size = moe_type_row_size(type, n);
    uint64_t bytes, count;
    if (!t)
        return moe__fail(error, MOE_ERROR_UNSUPPORTED, "type", "type %ld (%s) is not supported",
                         (long)type, moe_type_name(type));
    if (n_rows < 0)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "n_rows", "negative number of rows");
    if (row_size == 0)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "n",
                         "%lld weights are not a row of %s (blocks of %ld)", (long long)n, t->name,
                         (long)t->block);
    if (!moe__size_mul((uint64_t)n_rows, row_size, &bytes) || bytes > SIZE_MAX / 2 ||
        !moe__size_mul((uint64_t)n_rows, (uint64_t)n, &count) ||
        count > SIZE_MAX / 2 / sizeof(float))
        return moe__fail(error, MOE_ERROR_ARGUMENT, "n_rows", "more rows than memory has room for");
    if (n_rows > 0 && (!in || !out))
        return moe__fail(error, MOE_ERROR_ARGUMENT, in ? to : from, "NULL");
    return MOE_OK;
}

MOE_API moe_status moe_type_dequantize(moe_type type, const void *rows, float *out, int64_t n_rows,
                                       int64_t n, moe_error *error) {
    moe_status status = moe__types_check(type, rows, "rows", out, "out", n_rows, n, error);
    if (status != MOE_OK) return status;
    const moe__type *t = moe__type_find(type);
    size_t row_size = moe_type_row_size(type, n);
    if (n_rows % t->rows)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "n_rows", "rows of %s come in groups of %ld",
                         t->name, (long)t->rows);
    fenv_t callers;
    moe__floats_begin(&callers);
    for (int64_t r = 0; r < n_rows; r += t->rows)
        moe__type_to_f32(t, (const uint8_t *)rows + (size_t)r * row_size, n, out + r * n);
    moe__floats_end(&callers);
    return MOE_OK;
}

MOE_API moe_status moe_type_quantize(moe_type type, const float *in, void *rows, int64_t n_rows,
                                     int64_t n, const float *importance, moe_error *error) {
    moe_status status = moe__types_check(type, in, "in", rows, "rows", n_rows, n, error);
    if (status != MOE_OK) return status;
    const moe__type *t = moe__type_find(type);
    size_t row_size = moe_type_row_size(type, n);
    if (!t->quantize)
        return moe__fail(error, MOE_ERROR_UNSUPPORTED, "type", "%s can be read, but not made",
                         t->name);
    fenv_t callers;
    moe__floats_begin(&callers);
    for (int64_t r = 0; r < n_rows; r++)
        t->quantize(in + r * n, (uint8_t *)rows + (size_t)r * row_size, n, importance);
    moe__floats_end(&callers);
    return MOE_OK;
}

// ==============================================================================================
// >>kernels
//
// The inner loops, as one table of functions per instruction set. The plain C table comes first:
// it is the specification, and it runs where nothing better is there. Behind it lies one text of
// vector kernels that this file includes from itself, once per instruction set.
//
//   plain C         a function per row of the table; its arithmetic is explained in >>types
//   names, vectors  what the text is written in: two widths, one vocabulary; instruction sets
//                   differ there and in few places marked MOE__ISA
//   activations     floats to int8
//   dot products    one vector: rows are read once, from memory, so that reading is what takes
//                   time. By kind of type: floats, blocks of 256, interleaved rows, blocks of 32
//   tiles           many vectors: rows are unpacked once, into the caller's `pack`, and multiplied
//                   from registers; micro-kernels of 32 rows (16) times 2 to 6 vectors
//   floats          norms, activations of experts, softmax
//   attention       scores, weights and values of a chunk of keys, joined with those before
//   recurrences     tokens of a chunk through a state that is read once; scans, convolutions
//   picking a table what the processor has
//
// A kernel computes what it is told and nothing else: it allocates nothing, waits for nobody, knows
// no threads, and reads no byte behind its rows and vectors. Plain C and vectors give the same bits
// for quantized types; for floats each instruction set has an order of sums of its own, which does
// not depend on how many rows or vectors there are.
// ==============================================================================================

enum {
    MOE__TILE_ROWS = 32,    // most rows of one call of a tile kernel
    MOE__PACK_SIZE = 131072, // bytes of scratch of a tile kernel
    MOE__ATTEND_KEYS = 128, // keys of a chunk of attention
    MOE__ATTEND_QUERIES = 32, // most queries of one call of an attention kernel
    MOE__CHUNK = 16,        // tokens of a chunk of a recurrence
    MOE__CONV_TAPS = 16,    // most taps of a convolution
    MOE__PEAK = 128         // logits that one peak stands for
};

// Activations from n floats, n a multiple of 32 (Q32) or 256 (Q256). A NaN or infinity among the
// values of a scale makes that scale NaN.
typedef void moe__quantize_fn(const float *x, int64_t n, void *act);

// out[r] = row r . x, for n_rows rows of n weights that lie row_size bytes apart. x: activations
// in the kind that the type wants. Of interleaved types, here and below: whole groups of rows.
typedef void moe__dot_fn(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n,
                         const void *x, float *out);

// out[t * out_stride + r] = row r . x[t], for 1..MOE__TILE_ROWS rows and n_tokens >= 1 tokens.
// pack: MOE__PACK_SIZE bytes of scratch, aligned to 64. prefetch: what the caller reads next
// (prefetch_size bytes, may be 0), fetched into the cache while computing.
typedef void moe__tile_fn(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n,
                          const void *const *x, int64_t n_tokens, float *out, int64_t out_stride,
                          void *pack, const uint8_t *prefetch, size_t prefetch_size);

// One group of rows (one row of most types) of n weights, row after row.
typedef void moe__dequantize_fn(const uint8_t *rows, int64_t n, float *out);

typedef void moe__glu_fn(const float *gate, const float *up, int64_t n, float *out);

// Where value n of a row of cached keys or values lies. Q8_0: its block does, 34 bytes (an f16
// scale, 32 int8) as in files. For a whole row n is its size.
MOE__INLINE size_t moe__kv_bytes(moe_kv_type type, int64_t n) {
    if (type == MOE_KV_Q8_0) return (size_t)n / 32 * 34;
    return (size_t)n * (type == MOE_KV_F32 ? sizeof(float) : sizeof(uint16_t));
}

// Attention of some queries over some keys, by online softmax. Per query i there is a state: the
// largest score so far max[i] (-inf at first), the sum of exp(score - max) so far sum[i] (0 at
// first), and the weighted sum of values out[i], dv floats (0 at first), not yet divided by
// sum[i]. The call brings the state up to date with keys first[i] .. n_visible[i] - 1. If there are
// none, the state of the query is neither read nor written: several queries may then have one out.
//
// It does so by chunks of MOE__ATTEND_KEYS keys: what is seen of a chunk gives a state of its
// own, from nothing, which is then added to that of all keys before (attend_add). So the result
// has the same bits whether the chunks come in one call, in several, or each in one, to be added
// up later.
typedef struct moe__attend_args {
    const float *q;          // query i: dk floats at q + i * q_stride, already scaled
    int64_t q_stride;
    const void *k, *v;       // key j: dk values at byte j * k_bytes; value j: dv at j * v_bytes
    size_t k_bytes, v_bytes;
    moe_kv_type type;        // of keys and values
    int32_t dk, dv;          // any positive size; fast for multiples of 16; Q8_0: of 32
    int32_t n_queries;       // 1..MOE__ATTEND_QUERIES
    int32_t n_keys;          // 1 or more; chunks are counted from the first
    const int32_t *n_visible; // per query, 0..n_keys; NULL: all
    const int32_t *first;    // per query, >= 0, may be n_visible or more; NULL: 0
    float *max, *sum;
    float *const *out;
    float *scores;           // scratch: n_queries * MOE__ATTEND_KEYS floats, aligned to 64
} moe__attend_args;

// Some tokens of one chunk through a linear recurrence. Of one head there is a state S, n_k rows of
// n_v values, and token t does to it
//
//     S = diag(decay_t) S + k_t x delta_t    with delta_t = beta_t (v_t - S^T k_t), of the decayed
//     out_t = S^T q_t                        S (the delta rule), or delta_t = v_t if beta is NULL
//
// A chunk keeps S as it was before its first token, and of each token its key and delta. With D_t
// the product of decays of the chunk up to token t, S^T k_t is S_0^T (D_t k_t) plus, of each token
// j before, (k_t . D_t/D_j k_j) delta_j: reading S once serves all tokens of a call, and nothing
// is written to it until the chunk is full (fold). A token's results have the same bits in
// whatever calls the chunk comes: each dot product is a sum of its own, in a fixed order. What the
// arrays hold for tokens that have not come yet counts for nothing.
//
// Columns of S know nothing of each other: any range of them can be computed by itself.
typedef struct moe__recur_args {
    int32_t n_k, n_v;        // rows of the state, columns of this call
    int32_t done, n;         // tokens of the chunk before this call, and of it
    int32_t n_decay;         // decays of a token: 1, or n_k (one per row)
    const float *state;      // S_0: n_k rows, state_stride floats apart
    int64_t state_stride;
    const float *q, *k, *v;  // of token i: n_k, n_k and n_v floats at q + i * q_stride etc.
    const float *decay;      // n_decay floats at decay + i * decay_stride
    const float *beta;       // one float at beta + i * beta_stride; NULL: see above
    int64_t q_stride, k_stride, v_stride, decay_stride, beta_stride;
    float *keys;             // [n_k][MOE__CHUNK], keys of the chunk's tokens side by side; with a
                             // decay per row they are kept decayed up to now,
    float *weights;          // with a single one this is how much each has decayed; else 1
    float *total;            // [n_decay]: the product of all decays up to now
    float *deltas;           // of token j of the chunk: n_v floats at deltas + j * delta_stride
    int64_t delta_stride;
    float *out;              // of token i: n_v floats at out + i * out_stride
    int64_t out_stride;
    float *scratch;          // 2 * MOE__CHUNK * (n_k + n_v) floats, aligned to 64
} moe__recur_args;

typedef struct moe__type_kernels {
    moe__dot_fn *dot;
    moe__tile_fn *tile;
    moe__dequantize_fn *dequantize;
} moe__type_kernels;

typedef struct moe__kernels {
    moe_isa isa;
    moe__type_kernels type[MOE__N_TYPES]; // in the order of the type table
    moe__quantize_fn *quantize[MOE__ACT_KINDS]; // [MOE__ACT_F32] copies
    // out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]; weight NULL: 1. out may be x.
    void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *out);
    // out[i] = silu(gate[i]) * up[i], silu(x) = x / (1 + exp(-x)). out may be gate.
    moe__glu_fn *swiglu;
    // out[i] = g / (1 + exp(-1.702 g)) * (u + 1), g = min(gate[i], 7), u = up[i] within -7..7
    moe__glu_fn *swiglu_oai;
    // x[i] = exp(x[i] - max(x)) / sum; all -inf or a NaN inside: NaN
    void (*softmax)(float *x, int64_t n);
    // Weights of logits: e[i] = exp((x[i] - max) * scale) for x[i] >= least, 0 for the others,
    // for NaN and below 1e-300. No x[i] is above max, scale > 0. Returns their sum. The same
    // bits from every instruction set. e: n doubles, rounded up to a multiple of 16 (0 behind
    // n), or NULL.
    double (*weigh)(const float *x, int64_t n, float least, double max, double scale, double *e);
    // out[i]: the largest of x[MOE__PEAK * i ..], NaN does not count; -inf if there is none
    void (*peaks)(const float *x, int64_t n, float *out);
    // y[i] += a * x[i]
    void (*axpy)(float a, const float *x, int64_t n, float *y);
    void (*divide)(float *x, int64_t n, float by); // x[i] /= by
    void (*f32_to_f16)(const float *x, int64_t n, uint16_t *out); // to the nearest even
    // n values, a multiple of 32, to blocks as in moe__kv_bytes
    void (*f32_to_q8_0)(const float *x, int64_t n, uint8_t *out);
    void (*attend)(const moe__attend_args *args);
    // The state max, sum, x of one chunk is added to that of all before it; x, all: dv floats.
    void (*attend_add)(float max, float sum, const float *x, int64_t dv, float *all_max,
                       float *all_sum, float *all);
    void (*recur)(const moe__recur_args *args);
    // The state behind a full chunk of which all tokens went through recur: to = diag(total) S_0 +
    // sum over j of weights[j] keys[j] x deltas[j]. to may be args->state.
    void (*fold)(const moe__recur_args *args, float *to);
    // A recurrence with a decay per value: state [n_state][stride], one token, n channels.
    // S[i][c] = exp(dt[c] a[i][c]) S[i][c] + dt[c] x[c] b[i];  out[c] = sum over i of S[i][c] c[i]
    // a: [n_state][stride], too. to may be state.
    void (*scan)(const float *state, float *to, int64_t stride, int64_t n_state, int64_t n,
                 const float *dt, const float *x, const float *a, const float *b, const float *c,
                 float *out);
    // Channel by channel: out[c] = bias[c] + sum over i of w[i * stride + c] x[i][c], taps in
    // ascending order; then x / (1 + exp(-x)) of it if silu is set. bias NULL: 0.
    void (*conv)(const float *const *x, const float *w, int64_t stride, int32_t n_taps,
                 const float *bias, int64_t n, int silu, float *out);
    void (*gate)(float *x, const float *gate, int64_t n); // x[i] /= 1 + exp(-gate[i])
    // out[i] = ln(1 + exp(x[i] + bias[i])), x itself above 20. out may be x.
    void (*softplus)(const float *x, const float *bias, int64_t n, float *out);
    // Decays of one head: out[i] = exp(a softplus(x[i] + bias[i])), or, with low < 0,
    // exp(low / (1 + exp(-a (x[i] + bias[i])))). out may be x.
    void (*decay)(const float *x, const float *bias, int64_t n, float a, float low, float *out);
    // out[i] = max(up[i], 0)^2. out may be up.
    void (*relu_squared)(const float *up, int64_t n, float *out);
    // out[i] = min(silu(gate[i]), limit) * up[i] within -limit..limit. out may be gate.
    void (*swiglu_limited)(const float *gate, const float *up, int64_t n, float limit, float *out);
} moe__kernels;

// ---- the plain C table -----------------------------------------------------------------------

// Short loops in the order of the formulas: what a kernel is to compute, for every type and shape,
// is said here. Quantized types have the same bits from the vector kernels; sums of floats are in
// double here, and the vector kernels may differ from them by rounding only.

// Any block type: the rows of a group side by side.
MOE__PRIVATE void moe__kernels_dot(const moe__type *type, const uint8_t *rows, size_t row_size,
                                   int64_t n_rows, int64_t n, const void *x, float *out) {
    moe__block block;
    for (int64_t r = 0; r < n_rows; r += type->rows) {
        moe__group group = moe__group_begin(type, rows + (size_t)r * row_size);
        float sum[MOE__GROUP_ROWS][4] = {{0}};
        for (int64_t at = 0; at < n; at += type->block, group.at += type->rows * type->bytes)
            for (int k = 0; k < type->rows; k++) {
                moe__group_unpack(&group, k, &block);
                if (type->act == MOE__ACT_Q256)
                    sum[k][0] = moe__dot_256(&block, (const moe__act256 *)x + at / 256, sum[k][0]);
                else
                    moe__dot_32(type, &block, type->block, (const moe__act32 *)x + at / 256,
                                (int)(at % 256), sum[k]);
            }
        for (int k = 0; k < type->rows; k++)
            out[r + k] = (sum[k][0] + sum[k][2]) + (sum[k][1] + sum[k][3]);
    }
}

#define MOE__KERNELS_BLOCK(NAME, name, ...)                                                       \
    MOE__PRIVATE void moe__dot_##name(const uint8_t *rows, size_t row_size, int64_t n_rows,       \
                                      int64_t n, const void *x, float *out) {                     \
        moe__kernels_dot(&moe__types[MOE__INDEX_##NAME], rows, row_size, n_rows, n, x, out);      \
    }                                                                                             \
    MOE__PRIVATE void moe__dequantize_##name(const uint8_t *rows, int64_t n, float *out) {        \
        moe__types_dequantize(&moe__types[MOE__INDEX_##NAME], rows, n, out);                      \
    }
MOE__BLOCK_TYPES(MOE__KERNELS_BLOCK)
#undef MOE__KERNELS_BLOCK

#define MOE__KERNELS_FLOAT(name)                                                            \
    MOE__PRIVATE void moe__dot_##name(const uint8_t *rows, size_t row_size, int64_t n_rows, \
                                      int64_t n, const void *x, float *out) {               \
        for (int64_t r = 0; r < n_rows; r++)                                                \
            out[r] = (float)moe__types_row_##name(rows + (size_t)r * row_size, n, x);       \
    }
MOE__KERNELS_FLOAT(f32)
MOE__KERNELS_FLOAT(f16)
MOE__KERNELS_FLOAT(bf16)
#undef MOE__KERNELS_FLOAT

// Tokens outside, rows inside: a tile of rows stays in the cache.
#define MOE__KERNELS_TILE(NAME, name, ...)                                                     \
    MOE__PRIVATE void moe__tile_##name##_scalar(                                               \
        const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n, const void *const *x, \
        int64_t n_tokens, float *out, int64_t out_stride, void *pack, const uint8_t *prefetch, \
        size_t prefetch_size) {                                                                \
        (void)pack, (void)prefetch, (void)prefetch_size;                                       \
        for (int64_t t = 0; t < n_tokens; t++)                                                 \
            moe__dot_##name(rows, row_size, n_rows, n, x[t], out + t * out_stride);            \
    }
MOE__TYPES(MOE__KERNELS_TILE)
#undef MOE__KERNELS_TILE

MOE__PRIVATE void moe__rms_norm_scalar(const float *x, const float *weight, int64_t n, float eps,
                                       float *out) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    float scale = (float)(1 / sqrt(sum / (double)n + eps));
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * (weight ? weight[i] : 1);
}

MOE__PRIVATE void moe__swiglu_scalar(const float *gate, const float *up, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

// The comparisons let NaN through.
MOE__INLINE float moe__clamp(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;
}

MOE__PRIVATE void moe__swiglu_oai_scalar(const float *gate, const float *up, int64_t n,
                                         float *out) {
    for (int64_t i = 0; i < n; i++) {
        float g = moe__clamp(gate[i], -INFINITY, 7), u = moe__clamp(up[i], -7, 7);
        out[i] = g / (1 + expf(-1.702f * g)) * (u + 1);
    }
}

MOE__PRIVATE void moe__softmax_scalar(float *x, int64_t n) {
    float max = -INFINITY;
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        if (x[i] > max) max = x[i];
    for (int64_t i = 0; i < n; i++) {
        x[i] = expf(x[i] - max); // NaN if x[i] is, or if all are -inf: then so is the sum
        sum += x[i];
    }
    float inverse = (float)(1 / sum);
    for (int64_t i = 0; i < n; i++) x[i] *= inverse;
}

// 2^t for t > -1000: t = n + r with |r| <= 1/2, and 2^r = 1 + r p(r), a polynomial of degree 8
// (Remez; relative error 1.1e-12). Adding 1.5 * 2^52 leaves n in the low bits of the mantissa.
// 2^0 is 1. Each operation is rounded by itself and in the order of the vector kernels.
MOE__INLINE double moe__weigh_power(double t) {
    static const double c[8] = {1.3344144332419254e-06, 1.5314206034731837e-05,
                                0.00015403098456626539, 0.0013333434171244902,
                                0.0096181295586266428,  0.055504109592126163,
                                0.24022650694743239,    0.69314718054123725};
    double shifted = t + 6755399441055744.0, r = t - (shifted - 6755399441055744.0), p = c[0];
    for (int i = 1; i < 8; i++) p = moe__rounded_f64(p * r) + c[i];
    p = moe__rounded_f64(p * r) + 1;
    uint64_t exponent = moe__load_u64(&shifted) << 52, bits = moe__load_u64(&p) + exponent;
    memcpy(&p, &bits, sizeof p);
    return p;
}

// The end of weigh: sums of every 16th weight, made one in a fixed order.
MOE__INLINE double moe__weigh_sum(double *sum) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

MOE__PRIVATE double moe__weigh_scalar(const float *x, int64_t n, float least, double max,
                                      double scale, double *e) {
    double sum[16] = {0};
    const double factor = scale * 1.4426950408889634; // 1 / ln 2
    for (int64_t i = 0; i < (n + 15) / 16 * 16; i++) {
        double weight = 0;
        if (i < n && x[i] >= least) { // else and for -inf: t = -inf
            double t = moe__rounded_f64((x[i] - max) * factor);
            weight = t > -1000 ? moe__weigh_power(t) : 0;
        }
        sum[i % 16] += weight;
        if (e) e[i] = weight;
    }
    return moe__weigh_sum(sum);
}

MOE__PRIVATE void moe__peaks_scalar(const float *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += MOE__PEAK) {
        float peak = -INFINITY;
        for (int64_t j = i; j < moe__min(n, i + MOE__PEAK); j++)
            if (x[j] > peak) peak = x[j];
        out[i / MOE__PEAK] = peak;
    }
}

MOE__PRIVATE void moe__axpy_scalar(float a, const float *x, int64_t n, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

MOE__PRIVATE void moe__divide_scalar(float *x, int64_t n, float by) {
    for (int64_t i = 0; i < n; i++) x[i] /= by;
}

MOE__PRIVATE void moe__f32_to_f16_scalar(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = moe__f32_to_f16(x[i]);
}

// Stores the scale of a block whose largest magnitude is `peak` and returns its inverse. As half
// precision has it, so that the levels make up for its rounding. Not finite: NaN, levels are 0.
MOE__INLINE float moe__q8_0_scale(float peak, uint8_t *block) {
    uint16_t half = moe__f32_to_f16(peak / 127);
    if ((half & 0x7FFF) >= 0x7C00) half = 0x7E00;
    moe__store_u16(block, half);
    float scale = moe__f16_to_f32(half);
    return scale > 0 ? 1 / scale : 0;
}

MOE__PRIVATE void moe__f32_to_q8_0_scalar(const float *x, int64_t n, uint8_t *out) {
    for (; n > 0; n -= 32, x += 32, out += 34) {
        float peak = 0, finite = 0; // or NaN
        for (int i = 0; i < 32; i++) {
            if (fabsf(x[i]) > peak) peak = fabsf(x[i]);
            finite += 0 * x[i];
        }
        const float inverse = moe__q8_0_scale(peak + finite, out);
        for (int i = 0; i < 32; i++) {
            float level = inverse > 0 ? x[i] * inverse : 0;
            level = level > 127 ? 127 : level < -127 ? -127 : level;
            out[2 + i] = (uint8_t)(int8_t)lrintf(level);
        }
    }
}

// ---- attention

// Value c of a key or value row.
MOE__INLINE float moe__attend_load(const uint8_t *row, moe_kv_type type, int c) {
    const uint8_t *p = row + moe__kv_bytes(type, c);
    if (type == MOE_KV_Q8_0) return moe__types_f16(p) * (float)(int8_t)p[2 + c % 32];
    return type == MOE_KV_F32 ? moe__load_f32(p) : moe__types_f16(p);
}

// The weight that a state of this max has beside one of max `now`. With nothing but -inf any
// finite base will do: it gives 0 instead of NaN.
MOE__INLINE float moe__attend_factor(float max, float now) {
    return expf(max - fmaxf(now, -FLT_MAX));
}

// add * x + old * y, with the same rounding everywhere
MOE__INLINE float moe__attend_join(float add, float x, float old, float y) {
    return fmaf(add, x, moe__rounded_f32(old * y));
}

MOE__PRIVATE void moe__attend_add_scalar(float max, float sum, const float *x, int64_t dv,
                                         float *all_max, float *all_sum, float *all) {
    const float now = max > *all_max ? max : *all_max;
    const float old = moe__attend_factor(*all_max, now), add = moe__attend_factor(max, now);
    *all_max = now;
    *all_sum = moe__attend_join(add, sum, old, *all_sum);
    for (int64_t c = 0; c < dv; c++) all[c] = moe__attend_join(add, x[c], old, all[c]);
}

// scores[j] = q . key j for keys first .. n - 1; returns the largest of them. A NaN is never the
// largest: its own weight takes it to the sum.
MOE__INLINE float moe__attend_scores(const moe__attend_args *args, const float *q, int first, int n,
                                     float *scores) {
    float max = -INFINITY;
    for (int j = first; j < n; j++) {
        const uint8_t *key = (const uint8_t *)args->k + (size_t)j * args->k_bytes;
        double sum = 0;
        for (int c = 0; c < args->dk; c++)
            sum += (double)q[c] * moe__attend_load(key, args->type, c);
        scores[j - first] = (float)sum;
        if (scores[j - first] > max) max = scores[j - first];
    }
    return max;
}

// One query and what it sees of one chunk.
MOE__PRIVATE void moe__attend_query(const moe__attend_args *args, int i, int first, int n) {
    float *scores = args->scores + (size_t)i * MOE__ATTEND_KEYS, *out = args->out[i];
    const float *q = args->q + i * args->q_stride;
    const float max = moe__attend_scores(args, q, first, n, scores);
    const float now = max > args->max[i] ? max : args->max[i];
    const float old = moe__attend_factor(args->max[i], now), add = moe__attend_factor(max, now);
    double sum = 0;
    for (int j = first; j < n; j++)
        sum += scores[j - first] = moe__attend_factor(scores[j - first], max);
    args->max[i] = now;
    args->sum[i] = moe__attend_join(add, (float)sum, old, args->sum[i]);
    for (int c = 0; c < args->dv; c++) {
        float x = 0;
        for (int j = first; j < n; j++) {
            const uint8_t *value = (const uint8_t *)args->v + (size_t)j * args->v_bytes;
            x += scores[j - first] * moe__attend_load(value, args->type, c);
        }
        out[c] = moe__attend_join(add, x, old, out[c]);
    }
}

MOE__PRIVATE void moe__attend_scalar(const moe__attend_args *args) {
    for (int i = 0; i < args->n_queries; i++) {
        const int n = args->n_visible ? args->n_visible[i] : args->n_keys;
        for (int j = args->first ? args->first[i] : 0; j < n;) {
            const int end = (int)moe__min(n, (j / MOE__ATTEND_KEYS + 1) * MOE__ATTEND_KEYS);
            moe__attend_query(args, i, j, end);
            j = end;
        }
    }
}

// ---- recurrences

// Results of a call for S_0 alone: a[i] = S_0^T (D_i k_i), b[i] = S_0^T (D_i q_i).
MOE__PRIVATE void moe__recur_read(const moe__recur_args *args, const float *x, float *out) {
    for (int c = 0; c < args->n_v; c++) {
        double sum = 0;
        for (int r = 0; r < args->n_k; r++)
            sum += (double)args->state[r * args->state_stride + c] * x[r];
        out[c] = (float)sum;
    }
}

// One more decay: of the product of all, of the keys seen so far.
MOE__PRIVATE void moe__recur_decay(const moe__recur_args *args, int p, const float *decay) {
    for (int r = 0; r < args->n_decay; r++) args->total[r] *= decay[r];
    if (args->n_decay == 1) {
        for (int j = 0; j < p; j++) args->weights[j] *= decay[0];
        return;
    }
    for (int r = 0; r < args->n_k; r++)
        for (int j = 0; j < p; j++) args->keys[r * MOE__CHUNK + j] *= decay[r];
}

MOE__PRIVATE void moe__recur_scalar(const moe__recur_args *args) {
    float *x = args->scratch, *a = x + args->n_k, *b = a + args->n_v;
    for (int i = 0; i < args->n; i++) {
        const float *q = args->q + i * args->q_stride, *k = args->k + i * args->k_stride;
        const float *v = args->v + i * args->v_stride;
        const int p = args->done + i, one = args->n_decay == 1;
        float *delta = args->deltas + p * args->delta_stride;
        float *out = args->out + i * args->out_stride;
        double own = 0;
        moe__recur_decay(args, p, args->decay + i * args->decay_stride);
        for (int r = 0; r < args->n_k; r++) x[r] = args->total[one ? 0 : r] * q[r];
        moe__recur_read(args, x, b);
        memset(a, 0, (size_t)args->n_v * sizeof *a);
        for (int r = 0; r < args->n_k; r++) x[r] = args->total[one ? 0 : r] * k[r];
        if (args->beta) moe__recur_read(args, x, a);
        for (int j = 0; j < p; j++) {
            const float *other = args->deltas + j * args->delta_stride;
            double qk = 0, kk = 0;
            for (int r = 0; r < args->n_k; r++) {
                qk += (double)args->keys[r * MOE__CHUNK + j] * q[r];
                kk += (double)args->keys[r * MOE__CHUNK + j] * k[r];
            }
            const float to_b = (float)qk * args->weights[j], to_a = (float)kk * args->weights[j];
            for (int c = 0; c < args->n_v; c++) b[c] += to_b * other[c];
            for (int c = 0; c < args->n_v && args->beta; c++) a[c] += to_a * other[c];
        }
        const float beta = args->beta ? args->beta[i * args->beta_stride] : 1;
        for (int r = 0; r < args->n_k; r++) {
            own += (double)q[r] * k[r];
            args->keys[r * MOE__CHUNK + p] = k[r];
        }
        args->weights[p] = 1;
        for (int c = 0; c < args->n_v; c++) {
            delta[c] = beta * (v[c] - a[c]);
            out[c] = b[c] + (float)own * delta[c];
        }
    }
}

MOE__PRIVATE void moe__fold_scalar(const moe__recur_args *args, float *to) {
    for (int r = 0; r < args->n_k; r++) {
        const float total = args->total[args->n_decay == 1 ? 0 : r];
        for (int c = 0; c < args->n_v; c++) {
            float sum = total * args->state[r * args->state_stride + c];
            for (int j = 0; j < MOE__CHUNK; j++)
                sum += args->weights[j] * args->keys[r * MOE__CHUNK + j] *
                       args->deltas[j * args->delta_stride + c];
            to[r * args->state_stride + c] = sum;
        }
    }
}

MOE__PRIVATE void moe__scan_scalar(const float *state, float *to, int64_t stride, int64_t n_state,
                                   int64_t n, const float *dt, const float *x, const float *a,
                                   const float *b, const float *c, float *out) {
    for (int64_t j = 0; j < n; j++) {
        double sum = 0;
        for (int64_t i = 0; i < n_state; i++) {
            const float decay = expf(dt[j] * a[i * stride + j]);
            to[i * stride + j] = decay * state[i * stride + j] + dt[j] * x[j] * b[i];
            sum += (double)to[i * stride + j] * c[i];
        }
        out[j] = (float)sum;
    }
}

MOE__PRIVATE void moe__conv_scalar(const float *const *x, const float *w, int64_t stride,
                                   int32_t n_taps, const float *bias, int64_t n, int silu,
                                   float *out) {
    for (int64_t c = 0; c < n; c++) {
        float sum = bias ? bias[c] : 0;
        for (int i = 0; i < n_taps; i++) sum += w[i * stride + c] * x[i][c];
        out[c] = silu ? sum / (1 + expf(-sum)) : sum;
    }
}

MOE__PRIVATE void moe__gate_scalar(float *x, const float *gate, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] /= 1 + expf(-gate[i]);
}

MOE__INLINE float moe__softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

MOE__PRIVATE void moe__softplus_scalar(const float *x, const float *bias, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = moe__softplus(x[i] + bias[i]);
}

MOE__PRIVATE void moe__decay_scalar(const float *x, const float *bias, int64_t n, float a,
                                    float low, float *out) {
    for (int64_t i = 0; i < n; i++) {
        const float sum = x[i] + bias[i];
        out[i] = expf(low < 0 ? low / (1 + expf(-a * sum)) : a * moe__softplus(sum));
    }
}

MOE__PRIVATE void moe__relu_squared_scalar(const float *up, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) { // NaN stays
        const float x = up[i] < 0 ? 0 : up[i];
        out[i] = x * x;
    }
}

MOE__PRIVATE void moe__swiglu_limited_scalar(const float *gate, const float *up, int64_t n,
                                             float limit, float *out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = moe__clamp(gate[i] / (1 + expf(-gate[i])), -INFINITY, limit) *
                 moe__clamp(up[i], -limit, limit);
}

#define MOE__KERNELS_TYPE(NAME, name, ...) \
    {moe__dot_##name, moe__tile_##name##_scalar, moe__dequantize_##name},
static const moe__kernels moe__kernels_scalar = {
    MOE_ISA_SCALAR,
    {MOE__TYPES(MOE__KERNELS_TYPE)},
    {moe__quantize_act_f32, moe__quantize_act_q32, moe__quantize_act_q256},
    moe__rms_norm_scalar,
    moe__swiglu_scalar,
    moe__swiglu_oai_scalar,
    moe__softmax_scalar,
    moe__weigh_scalar,
    moe__peaks_scalar,
    moe__axpy_scalar,
    moe__divide_scalar,
    moe__f32_to_f16_scalar,
    moe__f32_to_q8_0_scalar,
    moe__attend_scalar,
    moe__attend_add_scalar,
    moe__recur_scalar,
    moe__fold_scalar,
    moe__scan_scalar,
    moe__conv_scalar,
    moe__gate_scalar,
    moe__softplus_scalar,
    moe__decay_scalar,
    moe__relu_squared_scalar,
    moe__swiglu_limited_scalar};
#undef MOE__KERNELS_TYPE

// ---- the vector kernels, once per instruction set --------------------------------------------

#if MOE__X86
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns inside its own AVX-512 headers (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define MOE__ISA 2
#include MOE_INFER_HEADER
#undef MOE__ISA
#if MOE__USE_AVX_VNNI
#define MOE__ISA 4
#include MOE_INFER_HEADER
#undef MOE__ISA
#endif
#if MOE__USE_AVX512
#define MOE__ISA 3
#include MOE_INFER_HEADER
#undef MOE__ISA
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif // MOE__X86
#endif // MOE__IMPLEMENT, first half

#else // MOE__ISA: the vector kernels, read once per instruction set ---------------------------

// MOE__(name) is name with the instruction set appended. MOE__K starts a kernel, MOE__V a helper
// that is always inlined into kernels. A helper's target may be a part of its caller's: AVX-VNNI
// and AVX-512 take some from AVX2. Vector types never leave this text.
#define MOE__PASTE_(a, b) a##b
#define MOE__PASTE(a, b) MOE__PASTE_(a, b)
#if MOE__ISA == 2
#define MOE__SUFFIX _avx2
#define MOE__TARGET __attribute__((target("avx2,fma,f16c")))
#elif MOE__ISA == 4
#define MOE__SUFFIX _avx_vnni
#if MOE__VNNI_EVEX
#define MOE__TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")))
#else
#define MOE__TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#endif
#else
#define MOE__SUFFIX _avx512
#define MOE__TARGET \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#endif
// Kernels that instruction sets take from AVX2: unpacking, and for AVX-VNNI all but tiles.
#define MOE__(name) MOE__PASTE(moe__##name, MOE__SUFFIX)
#define MOE__AVX2(name) MOE__PASTE(moe__##name, _avx2)
#if MOE__ISA == 4
#define MOE__SHARED(name) MOE__PASTE(moe__##name, _avx2)
#else
#define MOE__SHARED(name) MOE__PASTE(moe__##name, MOE__SUFFIX)
#endif
#define MOE__VNNI (MOE__ISA != 2) // whether int8 products are added up by one instruction
// Two sanitizers would make this text take minutes to compile. Tests hold its results against
// the plain C kernels, which are instrumented; threads only share what whole kernels made.
#define MOE__QUIET \
    __attribute__((no_sanitize("undefined"), no_sanitize("thread"), unused))
#define MOE__K static MOE__TARGET MOE__QUIET
#define MOE__V static inline MOE__TARGET MOE__QUIET __attribute__((always_inline))
// GCC keeps arrays of accumulators in memory unless every loop over them is unrolled.
#define MOE__UNROLL(n) MOE__UNROLL_(GCC unroll n)
#define MOE__UNROLL_(text) _Pragma(#text)

// ---- names -----------------------------------------------------------------------------------

// A name below is that of a function, type or constant of the instruction set being compiled. It
// stands here if the text uses it often; the others are written MOE__(name) where they are used.
// v_: on whole vectors of integers; u_: on 256 bits in every instruction set; f_, d_: on whole
// vectors of floats, of doubles; tile_, attend_, ...: of the section of that name. w_, s_, d_ and
// rw_, rs_, rd_: the words of the layouts in >>types.

// vectors of integers
#define v_load_128 MOE__SHARED(v_load_128)
#define v_load MOE__SHARED(v_load)
#define v_load_256 MOE__SHARED(v_load_256)
#define v_zero MOE__SHARED(v_zero)
#define v_set8 MOE__SHARED(v_set8)
#define v_set16 MOE__SHARED(v_set16)
#define v_and MOE__SHARED(v_and)
#define v_or MOE__SHARED(v_or)
#define v_xor MOE__SHARED(v_xor)
#define v_or_and MOE__SHARED(v_or_and)
#define v_lanes MOE__SHARED(v_lanes)
#define v_dot_u8 MOE__(v_dot_u8)
#define v_dot_i16 MOE__SHARED(v_dot_i16)
#define v_load16 MOE__SHARED(v_load16)
#define v_peak MOE__SHARED(v_peak)
#define v_act_scale MOE__SHARED(v_act_scale)
#define v_act_round MOE__SHARED(v_act_round)
#define v_act_pack MOE__SHARED(v_act_pack)
#define v_load_weights MOE__SHARED(v_load_weights)
#define v_store MOE__SHARED(v_store)
#define v_add_where MOE__SHARED(v_add_where)
#define v_e8m0 MOE__SHARED(v_e8m0)
#define v_turn_lanes MOE__SHARED(v_turn_lanes)
#define v_group MOE__SHARED(v_group)
#define v_acts MOE__SHARED(v_acts)
#define v_numbers MOE__SHARED(v_numbers)
#define v_spread MOE__SHARED(v_spread)
#define v_twos MOE__SHARED(v_twos)
#define v_quads MOE__SHARED(v_quads)
#define v_multiply MOE__SHARED(v_multiply)
#define v_extend MOE__SHARED(v_extend)
#define v_shift MOE__SHARED(v_shift)
#define v_field MOE__SHARED(v_field)
#define v_mask MOE__SHARED(v_mask)
#define v_join MOE__SHARED(v_join)
#define v_table MOE__SHARED(v_table)
#define v_lookup MOE__SHARED(v_lookup)
#define v_book8 MOE__SHARED(v_book8)
#define v_signed MOE__SHARED(v_signed)
#define v_lookup_16 MOE__SHARED(v_lookup_16)
#define v_book4 MOE__SHARED(v_book4)
#define v_book4_16 MOE__SHARED(v_book4_16)
#define v_dwords MOE__SHARED(v_dwords)
#define v_acts_r4 MOE__SHARED(v_acts_r4)
#define v_bits_r4 MOE__SHARED(v_bits_r4)
#define v_load_twice MOE__SHARED(v_load_twice)
#define v_scales_r4 MOE__SHARED(v_scales_r4)
#define v_pairs_r4 MOE__SHARED(v_pairs_r4)
#define v_times_sums_r4 MOE__SHARED(v_times_sums_r4)
#define v_multiply_r4 MOE__SHARED(v_multiply_r4)
#define v_shift_r4 MOE__SHARED(v_shift_r4)
#define v_acts_r8 MOE__SHARED(v_acts_r8)
#define v_hadd MOE__SHARED(v_hadd)
// 256 bits in every instruction set
#define u_set8 MOE__SHARED(u_set8)
#define u_set16 MOE__SHARED(u_set16)
#define u_f16 MOE__SHARED(u_f16)
#define u_sum MOE__SHARED(u_sum)
#define u_load_weights MOE__SHARED(u_load_weights)
#define u_load_weight MOE__SHARED(u_load_weight)
#define u_dot_end MOE__SHARED(u_dot_end)
#define u_dot_float MOE__SHARED(u_dot_float)
#define u_store_levels MOE__SHARED(u_store_levels)
#define u_store MOE__SHARED(u_store)
#define u_dequantize_float MOE__SHARED(u_dequantize_float)
#define u_or_and MOE__AVX2(v_or_and)
#define u_copy_i16 MOE__SHARED(u_copy_i16)
#define u_nibbles MOE__SHARED(u_nibbles)
#define u_mask MOE__SHARED(u_mask)
#define u_act32 MOE__SHARED(u_act32)
#define u_rounded MOE__AVX2(f_rounded)
#define u_times_sums MOE__SHARED(u_times_sums)
#define u_words MOE__SHARED(u_words)
#define u_halves MOE__SHARED(u_halves)
#define u_nibbles16 MOE__SHARED(u_nibbles16)
#define u_bits16 MOE__SHARED(u_bits16)
#define u_pairs16 MOE__SHARED(u_pairs16)
#define u_add16 MOE__SHARED(u_add16)
#define u_odd16 MOE__SHARED(u_odd16)
#define u_signs_book8 MOE__SHARED(u_signs_book8)
#define u_even_signs MOE__SHARED(u_even_signs)
#define u_signs_scales MOE__SHARED(u_signs_scales)
#define u_store_indices MOE__SHARED(u_store_indices)
#define u_indices MOE__SHARED(u_indices)
#define u_fours16 MOE__SHARED(u_fours16)
#define u_signs_book4 MOE__SHARED(u_signs_book4)
#define u_rows_8 MOE__SHARED(u_rows_8)
#define u_rows_4 MOE__SHARED(u_rows_4)
#define u_add_block MOE__SHARED(u_add_block)
#define u_row_scale MOE__SHARED(u_row_scale)
#define u_per_16 MOE__SHARED(u_per_16)
#define u_four_halves MOE__SHARED(u_four_halves)
#define u_mask8 MOE__SHARED(u_mask8)
#define u_add8 MOE__SHARED(u_add8)
#define u_bits_r4 MOE__SHARED(u_bits_r4)
#define u_odd_signed MOE__SHARED(u_odd_signed)
#define u_scales_rows MOE__SHARED(u_scales_rows)
#define u_dot_i16 MOE__SHARED(u_dot_i16)
#define u_ue4m3 MOE__SHARED(u_ue4m3)
#define u_put MOE__SHARED(u_put)
// vectors of floats
#define f_rounded MOE__SHARED(f_rounded)
#define f_scale MOE__SHARED(f_scale)
#define f_min MOE__SHARED(f_min)
#define f_mask MOE__SHARED(f_mask)
#define f_load_part MOE__SHARED(f_load_part)
#define f_load MOE__SHARED(f_load)
#define f_store_part MOE__SHARED(f_store_part)
#define f_store MOE__SHARED(f_store)
#define f_select_part MOE__SHARED(f_select_part)
#define f_load_half MOE__SHARED(f_load_half)
#define f_load_half_part MOE__SHARED(f_load_half_part)
#define f_to_half MOE__SHARED(f_to_half)
#define f_store_half MOE__SHARED(f_store_half)
#define f_store_half_part MOE__SHARED(f_store_half_part)
#define f_load_i8 MOE__SHARED(f_load_i8)
#define f_store_i8 MOE__SHARED(f_store_i8)
#define f_set_half MOE__SHARED(f_set_half)
#define f_set MOE__SHARED(f_set)
#define f_round MOE__SHARED(f_round)
#define f_low MOE__SHARED(f_low)
#define f_high MOE__SHARED(f_high)
#define f_upper MOE__SHARED(f_upper)
#define f_first MOE__SHARED(f_first)
#define f_at_least MOE__SHARED(f_at_least)
#define f_fold MOE__SHARED(f_fold)
#define f_fold_max MOE__SHARED(f_fold_max)
#define f_keep MOE__SHARED(f_keep)
#define f_zero MOE__SHARED(f_zero)
#define f_add MOE__SHARED(f_add)
#define f_sub MOE__SHARED(f_sub)
#define f_mul MOE__SHARED(f_mul)
#define f_div MOE__SHARED(f_div)
#define f_fma MOE__SHARED(f_fma)
#define f_fnma MOE__SHARED(f_fnma)
#define f_max MOE__SHARED(f_max)
#define f_sum MOE__SHARED(f_sum)
#define f_largest MOE__SHARED(f_largest)
#define f_sum4 MOE__SHARED(f_sum4)
#define f_exp MOE__SHARED(f_exp)
#define f_glu MOE__SHARED(f_glu)
#define f_gate MOE__SHARED(f_gate)
#define f_softplus MOE__SHARED(f_softplus)
#define f_load_n MOE__SHARED(f_load_n)
#define f_store_n MOE__SHARED(f_store_n)
// vectors of doubles
#define d_weigh MOE__SHARED(d_weigh)
#define d_above MOE__SHARED(d_above)
#define d_scale MOE__SHARED(d_scale)
#define d_fold MOE__SHARED(d_fold)
#define d_zero MOE__SHARED(d_zero)
#define d_add MOE__SHARED(d_add)
#define d_square_add MOE__SHARED(d_square_add)
#define d_sum MOE__SHARED(d_sum)
#define d_set MOE__SHARED(d_set)
#define d_sub MOE__SHARED(d_sub)
#define d_product MOE__SHARED(d_product)
#define d_step MOE__SHARED(d_step)
// prefetching
#define fetch_ahead MOE__SHARED(fetch_ahead)
#define fetch_line MOE__SHARED(fetch_line)
#define fetch_line_far MOE__SHARED(fetch_line_far)
#define fetch_stream MOE__SHARED(fetch_stream)
// blocks of 32 weights, and what unpacks any row
#define q32_size MOE__SHARED(q32_size)
#define q32_shift MOE__SHARED(q32_shift)
#define q32_block MOE__SHARED(q32_block)
#define q32_load MOE__SHARED(q32_load)
#define q32_fifths MOE__SHARED(q32_fifths)
#define q32_levels MOE__SHARED(q32_levels)
#define unpack_fn MOE__SHARED(unpack_fn)
// interleaved rows
#define rows_head MOE__SHARED(rows_head)
#define r4_t MOE__SHARED(r4_t)
#define r4_half MOE__SHARED(r4_half)
#define rows_out MOE__SHARED(rows_out)
#define rows_put MOE__SHARED(rows_put)
#define level_iq4_xs_r8 MOE__SHARED(level_iq4_xs_r8)
// tiles
#define TILE_PACK MOE__SHARED(TILE_PACK)
#define TILE_SUMS_AT MOE__SHARED(TILE_SUMS_AT)
#define TILE_SCALE MOE__SHARED(TILE_SCALE)
#define TILE_D MOE__SHARED(TILE_D)
#define TILE_DMIN MOE__SHARED(TILE_DMIN)
#define TILE_MIN MOE__SHARED(TILE_MIN)
#define TILE_START MOE__SHARED(TILE_START)
#define tile_put MOE__SHARED(tile_put)
#define tile_put_scale MOE__SHARED(tile_put_scale)
#define tile_put_int MOE__SHARED(tile_put_int)
#define tile_job MOE__SHARED(tile_job)
#define tile_kernel_fn MOE__SHARED(tile_kernel_fn)
#define tile_dot MOE__(tile_dot)
#define tile_end MOE__(tile_end)
#define tile_even MOE__(tile_even)
#define tile_odd MOE__(tile_odd)
#define tile_dot_i16 MOE__(tile_dot_i16)
#define tile_columns MOE__SHARED(tile_columns)
#define tile_pair MOE__SHARED(tile_pair)
#define tile_turn MOE__SHARED(tile_turn)
#define tile_low MOE__SHARED(tile_low)
#define tile_high_nibbles MOE__SHARED(tile_high_nibbles)
#define tile_plan MOE__SHARED(tile_plan)
#define tile_turn_blocks MOE__SHARED(tile_turn_blocks)
#define tile_ahead MOE__SHARED(tile_ahead)
#define tile_cut MOE__SHARED(tile_cut)
// attention
#define ATTEND_STEP MOE__SHARED(ATTEND_STEP)
#define ATTEND_TURNED MOE__SHARED(ATTEND_TURNED)
#define kv_load MOE__SHARED(kv_load)
#define kv_load_part MOE__SHARED(kv_load_part)
#define attend_rows MOE__SHARED(attend_rows)
#define attend_most MOE__SHARED(attend_most)
#define attend_least MOE__SHARED(attend_least)
#define attend_stream MOE__SHARED(attend_stream)
#define attend_chunk MOE__SHARED(attend_chunk)
#define score_args MOE__SHARED(score_args)
#define score_tile MOE__SHARED(score_tile)
#define block_args MOE__SHARED(block_args)
#define block_tile MOE__SHARED(block_tile)
#define attend_joined MOE__SHARED(attend_joined)
#define attend_out MOE__SHARED(attend_out)
#define value_args MOE__SHARED(value_args)
#define value_load MOE__SHARED(value_load)
#define value_weight MOE__SHARED(value_weight)
#define value_tile MOE__SHARED(value_tile)
#define value_cut MOE__SHARED(value_cut)
// recurrences
#define recur_job MOE__SHARED(recur_job)
#define recur_tokens MOE__SHARED(recur_tokens)
#define read_args MOE__SHARED(read_args)
#define read_tile MOE__SHARED(read_tile)
#define fold_args MOE__SHARED(fold_args)
#define fold_tile MOE__SHARED(fold_tile)
// words of layouts
#define v_level_of MOE__SHARED(v_level_of)

// ---- vectors ---------------------------------------------------------------------------------

// MOE__VI and MOE__VF are whole vectors of integers and floats, MOE__MM(op) is the intrinsic of
// that width where both instruction sets have it under the same name. A vector has MOE__LANES
// lanes of 128 bits. Products that are to be fused are written as fmadd, so that C and C++ give
// the same bits.
#if MOE__ISA == 3
#define MOE__VI __m512i
#define MOE__VF __m512
#define MOE__MM(op) _mm512_##op
#define MOE__VBYTES 64
#define MOE__LANES 4
#else
#define MOE__VI __m256i
#define MOE__VF __m256
#define MOE__MM(op) _mm256_##op
#define MOE__VBYTES 32
#define MOE__LANES 2
#endif
#define MOE__VFLOATS (MOE__VBYTES / 4) // floats in a vector

#if MOE__ISA != 4 // AVX-VNNI has these from AVX2

MOE__V __m128i v_load_128(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
MOE__V __m256i v_load_256(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
MOE__V void u_store(void *p, __m256i x) { _mm256_storeu_si256((__m256i *)p, x); }
// x in every byte or int16. GCC's own make 32 or 16 parameters of it, which without optimization
// took a quarter of the time of compiling this text.
MOE__V __m256i u_set8(char x) {
    const __v32qi zero = (__v32qi)_mm256_setzero_si256();
    return (__m256i)(zero + x);
}
MOE__V __m256i u_set16(short x) {
    const __v16hi zero = (__v16hi)_mm256_setzero_si256();
    return (__m256i)(zero + x);
}

#if MOE__ISA == 3
MOE__V __m512i v_load(const void *p) { return _mm512_loadu_si512(p); }
MOE__V void v_store(void *p, __m512i x) { _mm512_storeu_si512(p, x); }
MOE__V __m512i v_zero(void) { return _mm512_setzero_si512(); }
MOE__V __m512i v_set8(char x) { return _mm512_set1_epi8(x); }
MOE__V __m512i v_set16(short x) { return _mm512_set1_epi16(x); }
MOE__V __m512i v_and(__m512i a, __m512i b) { return _mm512_and_si512(a, b); }
MOE__V __m512i v_or(__m512i a, __m512i b) { return _mm512_or_si512(a, b); }
MOE__V __m512i v_xor(__m512i a, __m512i b) { return _mm512_xor_si512(a, b); }
// a | (b & mask)
MOE__V __m512i v_or_and(__m512i a, __m512i b, __m512i mask) {
    return _mm512_ternarylogic_epi32(a, b, mask, 0xF8);
}
// x in every lane
MOE__V __m512i v_lanes(__m128i x) { return _mm512_broadcast_i32x4(x); }
// acc + the sums of four neighbouring products of unsigned and signed bytes
MOE__V __m512i v_dot_u8(__m512i acc, __m512i a, __m512i b) {
    return _mm512_dpbusd_epi32(acc, a, b);
}
// acc + the sums of two neighbouring int16 products
MOE__V __m512i v_dot_i16(__m512i acc, __m512i a, __m512i b) {
    return _mm512_dpwssd_epi32(acc, a, b);
}
#else
MOE__V __m256i v_load(const void *p) { return v_load_256(p); }
MOE__V void v_store(void *p, __m256i x) { u_store(p, x); }
MOE__V __m256i v_zero(void) { return _mm256_setzero_si256(); }
MOE__V __m256i v_set8(char x) { return u_set8(x); }
MOE__V __m256i v_set16(short x) { return u_set16(x); }
MOE__V __m256i v_and(__m256i a, __m256i b) { return _mm256_and_si256(a, b); }
MOE__V __m256i v_or(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
MOE__V __m256i v_xor(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }
MOE__V __m256i v_or_and(__m256i a, __m256i b, __m256i mask) {
    return _mm256_or_si256(a, _mm256_and_si256(b, mask));
}
MOE__V __m256i v_lanes(__m128i x) { return _mm256_broadcastsi128_si256(x); }
MOE__V __m256i v_dot_i16(__m256i acc, __m256i a, __m256i b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
#endif
MOE__V MOE__VF f_zero(void) { return MOE__MM(setzero_ps)(); }
MOE__V MOE__VF f_set(float x) { return MOE__MM(set1_ps)(x); }
MOE__V MOE__VF f_load(const void *p) { return MOE__MM(loadu_ps)((const float *)p); }
MOE__V void f_store(void *p, MOE__VF x) { MOE__MM(storeu_ps)((float *)p, x); }
MOE__V MOE__VF f_add(MOE__VF a, MOE__VF b) { return MOE__MM(add_ps)(a, b); }
MOE__V MOE__VF f_sub(MOE__VF a, MOE__VF b) { return MOE__MM(sub_ps)(a, b); }
MOE__V MOE__VF f_mul(MOE__VF a, MOE__VF b) { return MOE__MM(mul_ps)(a, b); }
MOE__V MOE__VF f_div(MOE__VF a, MOE__VF b) { return MOE__MM(div_ps)(a, b); }
// a * b + c and c - a * b, rounded once.
MOE__V MOE__VF f_fma(MOE__VF a, MOE__VF b, MOE__VF c) { return MOE__MM(fmadd_ps)(a, b, c); }
MOE__V MOE__VF f_fnma(MOE__VF a, MOE__VF b, MOE__VF c) { return MOE__MM(fnmadd_ps)(a, b, c); }
// If either is NaN, these give b.
MOE__V MOE__VF f_max(MOE__VF a, MOE__VF b) { return MOE__MM(max_ps)(a, b); }
MOE__V MOE__VF f_min(MOE__VF a, MOE__VF b) { return MOE__MM(min_ps)(a, b); }
// x, in a register: GCC would read memory again for each of 2 or 3 uses.
MOE__V MOE__VF f_keep(MOE__VF x) {
    __asm__("" : "+v"(x));
    return x;
}
// x, rounded before it is used: a product is not fused with what is added to it.
MOE__V MOE__VF f_rounded(MOE__VF x) {
    __asm__("" : "+v"(x));
    return x;
}

// The cache line of p: what is read soon, to the first level; what the next tile reads, to the
// second
MOE__V void fetch_line(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
MOE__V void fetch_line_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

// 16 bytes in every lane
MOE__V MOE__VI v_load16(const void *p) { return v_lanes(v_load_128(p)); }

// ---- activations to int8 ---------------------------------------------------------------------

// The same bits as moe__quantize_act_*: the largest magnitude is found on bit patterns, where
// NaN is above infinity and that above all numbers; cvtps rounds to nearest even; nothing is
// fused.

MOE__V MOE__VI v_peak(MOE__VI peak, const float *x) {
    MOE__VI bits = v_and(v_load(x), MOE__MM(set1_epi32)(0x7FFFFFFF));
    return MOE__MM(max_epi32)(peak, bits);
}

// From bits of magnitudes to *scale. The result is 127 / peak, or 0 if all q are to be zero:
// peaks below 2^-120 (127 / peak would not be finite), infinity and NaN.
MOE__V float v_act_scale(MOE__VI peak, float *scale) {
#if MOE__ISA == 3
    __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(peak),
                                    _mm512_extracti64x4_epi64(peak, 1));
#else
    __m256i half = peak;
#endif
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
    uint32_t bits = (uint32_t)_mm_cvtsi128_si32(m);
    int bad = bits >= 0x7F800000, small = bits < 0x03800000;
    float value = moe__f32_from_bits(bits);
    *scale = bad ? moe__f32_from_bits(0x7FC00000) : small ? 0 : value / 127.0f;
    return bad || small ? 0 : 127.0f / value;
}

#if MOE__ISA == 2
MOE__V __m256i v_act_round(const float *x, __m256 scale, __m256 on) {
    return _mm256_cvtps_epi32(_mm256_and_ps(on, _mm256_mul_ps(_mm256_loadu_ps(x), scale)));
}
#endif

// 32 values to int8, 16 to `low`, 16 to `high`; inverse = 0 gives zeros whatever x is. Result:
// the sums of four neighbours.
MOE__V __m256i v_act_pack(const float *x, float inverse, int8_t *low, int8_t *high) {
    MOE__VF scale = MOE__MM(set1_ps)(inverse);
#if MOE__ISA == 3
    __mmask16 on = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    __m512i a = _mm512_maskz_cvtps_epi32(on, _mm512_mul_ps(_mm512_loadu_ps(x), scale));
    __m512i b = _mm512_maskz_cvtps_epi32(on, _mm512_mul_ps(_mm512_loadu_ps(x + 16), scale));
    __m256i bytes = _mm256_castsi128_si256(_mm512_cvtepi32_epi8(a));
    bytes = _mm256_inserti128_si256(bytes, _mm512_cvtepi32_epi8(b), 1);
#else
    __m256 on = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_NEQ_OQ);
    __m256i ab = _mm256_packs_epi32(v_act_round(x, scale, on), v_act_round(x + 8, scale, on));
    __m256i cd = _mm256_packs_epi32(v_act_round(x + 16, scale, on), v_act_round(x + 24, scale, on));
    // Packing works in lanes: the dwords are a0 b0 c0 d0 | a1 b1 c1 d1.
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd),
                                                _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
    _mm_storeu_si128((__m128i *)(void *)low, _mm256_castsi256_si128(bytes));
    _mm_storeu_si128((__m128i *)(void *)high, _mm256_extracti128_si256(bytes, 1));
    __m256i pairs = _mm256_maddubs_epi16(u_set8(1), bytes);
    return _mm256_madd_epi16(pairs, u_set16(1));
}

MOE__K void MOE__(quantize_f32)(const float *x, int64_t n, void *act) {
    memcpy(act, x, (size_t)n * sizeof(float));
}

MOE__K void MOE__(quantize_q32)(const float *x, int64_t n, void *act) {
    moe__act32 *record = (moe__act32 *)act;
    for (; n > 0; n -= 256, x += 256, record++) {
        if (n < 256) memset(record, 0, sizeof *record);
        for (int j = 0; j < 8 && 32 * j < n; j++) {
            MOE__VI peak = v_zero();
            for (int i = 0; i < 32; i += MOE__VFLOATS) peak = v_peak(peak, x + 32 * j + i);
            float inverse = v_act_scale(peak, &record->d[j]);
            int8_t *q = record->q + moe__act32_at(32 * j);
            __m256i sums = v_act_pack(x + 32 * j, inverse, q, q + 64);
            __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums),
                                      _mm256_extracti128_si256(sums, 1));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
            record->nsum[j] = -_mm_cvtsi128_si32(s);
        }
    }
}

MOE__K void MOE__(quantize_q256)(const float *x, int64_t n, void *act) {
    moe__act256 *record = (moe__act256 *)act;
    for (; n >= 256; n -= 256, x += 256, record++) {
        MOE__VI peak = v_zero();
        for (int i = 0; i < 256; i += MOE__VFLOATS) peak = v_peak(peak, x + i);
        float inverse = v_act_scale(peak, &record->d);
        for (int i = 0; i < 2; i++) {
            const float *from = x + 128 * i;
            int8_t *q = record->q + 128 * i; // see moe__act256_at
            __m256i ab = _mm256_hadd_epi32(v_act_pack(from, inverse, q, q + 16),
                                           v_act_pack(from + 32, inverse, q + 64, q + 80));
            __m256i cd = _mm256_hadd_epi32(v_act_pack(from + 64, inverse, q + 32, q + 48),
                                           v_act_pack(from + 96, inverse, q + 96, q + 112));
            // Sums of 16 values, numbers 0 2 4 6 | 1 3 5 7 of these 128.
            __m256i sums = _mm256_hadd_epi32(ab, cd);
            sums = _mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            __m256i negative = _mm256_sub_epi32(_mm256_setzero_si256(), sums);
            __m128i sums16 = _mm_packs_epi32(_mm256_castsi256_si128(sums),
                                             _mm256_extracti128_si256(sums, 1));
            _mm256_storeu_si256((__m256i *)(void *)(record->nsum + 8 * i), negative);
            _mm_storeu_si128((__m128i *)(void *)(record->sum16 + 8 * i), sums16);
            _mm_storel_epi64((__m128i *)(void *)(record->sum32 + 4 * i),
                             _mm_hadd_epi16(sums16, sums16));
        }
        memset(record->pad, 0, sizeof record->pad);
    }
}

MOE__V float u_f16(const uint8_t *p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(moe__load_u16(p))));
}

// ---- dot products: reading rows --------------------------------------------------------------

// Rows are read from the first byte to the last, one after the other: hardware prefetchers
// follow a single stream at the speed of memory, but not rows side by side (measured on Zen 4:
// 0.91 of plain reading against 0.65). A fetch one page ahead bridges where they stop, at the
// end of a page. Each row is summed by itself, so it has the same bits wherever it lies.
enum { MOE__(AHEAD) = 4096 };

// Fetches `size` bytes that lie AHEAD of p, but nothing from `end` on.
MOE__V void fetch_ahead(const uint8_t *p, const uint8_t *end, const int size) {
    const uintptr_t at = (uintptr_t)p + MOE__(AHEAD);
    if (at >= (uintptr_t)end) return;
    MOE__UNROLL(8)
    for (int i = 0; i < size; i += 64) fetch_line((const uint8_t *)at + i);
}

MOE__V float u_sum(__m256 x) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_add_ps(q, _mm_movehdup_ps(q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehl_ps(q, q)));
}

// ---- dot products: plain floats --------------------------------------------------------------

// F32, F16 and BF16 weights times activations as floats: nothing is quantized. In the order of a
// product's sums weight k joins chain k mod 32, whose ends are added in pairs; one vector (dot) and
// many (tile) keep to it.

// 8 weights as floats; type: an index of the type table
MOE__V __m256 u_load_weights(const uint8_t *p, const int type) {
    if (type == MOE__INDEX_F16) return _mm256_cvtph_ps(v_load_128(p));
    if (type == MOE__INDEX_F32) return _mm256_loadu_ps((const float *)(const void *)p);
    const __m256i bits = _mm256_cvtepu16_epi32(v_load_128(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

MOE__V float u_load_weight(const uint8_t *p, const int type) {
    if (type == MOE__INDEX_F16) return u_f16(p);
    if (type == MOE__INDEX_BF16) return moe__bf16_to_f32(moe__load_u16(p));
    return moe__load_f32(p);
}

// The end of a product: the sums of weights k mod 32 = 0-7, 8-15, 16-23, 24-31 of all whole 32,
// and `left` weights behind them
MOE__V float u_dot_end(__m256 sum0, __m256 sum1, __m256 sum2, __m256 sum3, const uint8_t *w,
                       const float *a, int64_t left, const int type) {
    const int size = type == MOE__INDEX_F32 ? 4 : 2;
    for (; left >= 8; left -= 8, w += 8 * size, a += 8)
        sum0 = _mm256_fmadd_ps(u_load_weights(w, type), _mm256_loadu_ps(a), sum0);
    sum0 = _mm256_add_ps(_mm256_add_ps(sum0, sum1), _mm256_add_ps(sum2, sum3));
    float total = u_sum(sum0);
    for (; left > 0; left--, w += size, a++) // fused as written: the same bits from C++
        total = _mm_cvtss_f32(
            _mm_fmadd_ss(_mm_set_ss(u_load_weight(w, type)), _mm_set_ss(*a), _mm_set_ss(total)));
    return total;
}

// Four sums, so that chains of multiply-adds hide each other's latency. Nothing is fetched
// ahead: with so little to compute hardware prefetchers do better alone (Zen 4: 0.9 of plain
// reading, against 0.7 with 256 bits and 0.4 with 512 when fetching).
MOE__V void u_dot_float(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n,
                        const void *x, float *out, const int type) {
    const int size = type == MOE__INDEX_F32 ? 4 : 2;
    for (int64_t r = 0; r < n_rows; r++) {
        const uint8_t *w = rows + (size_t)r * row_size;
        const float *a = (const float *)x;
        __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
        int64_t left = n;
#define MOE__STEP(sum, k)                                                   \
    sum = _mm256_fmadd_ps(u_load_weights(w + 8 * size * (k), type),  \
                          _mm256_loadu_ps(a + 8 * (k)), sum)
        for (; left >= 32; left -= 32, w += 32 * size, a += 32) {
            MOE__STEP(sum0, 0);
            MOE__STEP(sum1, 1);
            MOE__STEP(sum2, 2);
            MOE__STEP(sum3, 3);
        }
#undef MOE__STEP
        out[r] = u_dot_end(sum0, sum1, sum2, sum3, w, a, left, type);
    }
}

// Many tokens. Two rows times six tokens fill the registers with sums, a vector of the 32 that
// one product has; those of all rows lie in the scratch, [row][token][32], while weights and
// activations are read in pieces that stay in the first-level cache. Each product is added up
// in the order of u_dot_float and has its bits.
enum { MOE__(FLOAT_TOKENS) = 6, MOE__(FLOAT_PIECE) = 1024 };

MOE__V MOE__VF v_load_weights(const uint8_t *p, const int type) {
#if MOE__ISA == 3
    if (type == MOE__INDEX_F32) return _mm512_loadu_ps(p);
    if (type == MOE__INDEX_F16) return _mm512_cvtph_ps(v_load_256(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v_load_256(p)), 16));
#else
    return u_load_weights(p, type);
#endif
}

// n weights, a multiple of 32, of two rows times six tokens, all from number k on. The loops over
// tokens are unrolled so that no sums stay in memory.
MOE__V void MOE__(tile_float_piece)(const uint8_t *row0, const uint8_t *row1,
                                    const float *const *x, int64_t k, int64_t n, float *sums,
                                    const int type) {
    enum { TOKENS = MOE__(FLOAT_TOKENS) };
    const int size = type == MOE__INDEX_F32 ? 4 : 2;
    const float *token[TOKENS];
    MOE__VF acc0[TOKENS], acc1[TOKENS];
    row0 += size * k, row1 += size * k;
    MOE__UNROLL(6)
    for (int t = 0; t < TOKENS; t++) token[t] = x[t] + k;
    for (int64_t chain = 0; chain < 32; chain += MOE__VFLOATS) {
        float *sums0 = sums + chain, *sums1 = sums0 + 32 * TOKENS;
        MOE__UNROLL(6)
        for (int t = 0; t < TOKENS; t++)
            acc0[t] = f_load(sums0 + 32 * t), acc1[t] = f_load(sums1 + 32 * t);
        for (int64_t i = chain; i < n; i += 32) {
            const MOE__VF w0 = v_load_weights(row0 + size * i, type);
            const MOE__VF w1 = v_load_weights(row1 + size * i, type);
            MOE__UNROLL(6)
            for (int t = 0; t < TOKENS; t++) {
                const MOE__VF b = f_keep(f_load(token[t] + i));
                acc0[t] = f_fma(w0, b, acc0[t]);
                acc1[t] = f_fma(w1, b, acc1[t]);
            }
        }
        MOE__UNROLL(6)
        for (int t = 0; t < TOKENS; t++)
            f_store(sums0 + 32 * t, acc0[t]), f_store(sums1 + 32 * t, acc1[t]);
    }
}

// moe__tile_fn of plain floats
MOE__V void MOE__(tile_float)(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n,
                              const void *const *x, int64_t n_tokens, float *out,
                              int64_t out_stride, void *pack, const uint8_t *prefetch,
                              size_t prefetch_size, moe__dot_fn *dot, const int type) {
    enum { TOKENS = MOE__(FLOAT_TOKENS), PIECE = MOE__(FLOAT_PIECE) };
    const int size = type == MOE__INDEX_F32 ? 4 : 2;
    const int64_t whole = n / 32 * 32, n_pieces = (whole + PIECE - 1) / PIECE;
    const int64_t n_groups = (n_tokens + TOKENS - 3) / TOKENS;
    const int64_t n_steps = moe__max(1, n_groups * n_pieces * ((n_rows + 1) / 2));
    const size_t per_step = (prefetch_size / (size_t)n_steps + 64) / 64 * 64;
    size_t fetched = 0;
    float *sums = (float *)pack;
    const float *token[TOKENS];
    // One or two tokens are left to the dot product, more are filled up to six.
    for (; n_tokens > 2; n_tokens -= TOKENS, x += TOKENS, out += TOKENS * out_stride) {
        const int count = (int)moe__min(n_tokens, TOKENS);
        for (int t = 0; t < TOKENS; t++) token[t] = (const float *)x[t < count ? t : 0];
        memset(sums, 0, (size_t)(n_rows + 1) / 2 * 2 * TOKENS * 32 * sizeof *sums);
        for (int64_t k = 0; k < whole; k += PIECE)
            for (int64_t r = 0; r < n_rows; r += 2) {
                const uint8_t *row = rows + (size_t)r * row_size;
                for (size_t i = 0; i < per_step && fetched < prefetch_size; i += 64, fetched += 64)
                    fetch_line_far(prefetch + fetched);
                MOE__(tile_float_piece)(row, row + (r + 1 < n_rows ? row_size : 0), token, k,
                                        moe__min(whole - k, PIECE), sums + r * TOKENS * 32, type);
            }
        for (int64_t r = 0; r < n_rows; r++)
            for (int t = 0; t < count; t++) {
                const float *s = sums + (r * TOKENS + t) * 32;
                out[t * out_stride + r] =
                    u_dot_end(_mm256_loadu_ps(s), _mm256_loadu_ps(s + 8), _mm256_loadu_ps(s + 16),
                              _mm256_loadu_ps(s + 24), rows + (size_t)r * row_size + size * whole,
                              token[t] + whole, n - whole, type);
            }
    }
    for (int64_t t = 0; t < n_tokens; t++)
        dot(rows, row_size, n_rows, n, x[t], out + t * out_stride);
}

#define MOE__FLOAT_TYPE(NAME, name)                                                               \
    MOE__K void MOE__(dot_##name)(const uint8_t *rows, size_t row_size, int64_t n_rows,           \
                                  int64_t n, const void *x, float *out) {                         \
        u_dot_float(rows, row_size, n_rows, n, x, out, MOE__INDEX_##NAME);                 \
    }                                                                                             \
    MOE__K void MOE__(tile_##name)(const uint8_t *rows, size_t row_size, int64_t n_rows,          \
                                   int64_t n, const void *const *x, int64_t n_tokens, float *out, \
                                   int64_t out_stride, void *pack, const uint8_t *prefetch,       \
                                   size_t prefetch_size) {                                        \
        MOE__(tile_float)(rows, row_size, n_rows, n, x, n_tokens, out, out_stride, pack,          \
                          prefetch, prefetch_size, MOE__(dot_##name), MOE__INDEX_##NAME);         \
    }
MOE__FLOAT_TYPE(F32, f32)
MOE__FLOAT_TYPE(F16, f16)
MOE__FLOAT_TYPE(BF16, bf16)
#undef MOE__FLOAT_TYPE

// ---- dequantize ------------------------------------------------------------------------------

// The same bits as the plain C. (A signalling NaN among f16 weights comes out quiet.) All
// instruction sets use these.
#if MOE__ISA == 2
// out[i] = q[i] * scale - min, for 16 signed bytes
MOE__V void u_store_levels(float *out, __m128i q, float scale, float min) {
    const __m256 s = _mm256_set1_ps(scale), m = _mm256_set1_ps(min);
    const __m256i low = _mm256_cvtepi8_epi32(q);
    const __m256i high = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(q, q));
    _mm256_storeu_ps(out, _mm256_fmsub_ps(_mm256_cvtepi32_ps(low), s, m));
    _mm256_storeu_ps(out + 8, _mm256_fmsub_ps(_mm256_cvtepi32_ps(high), s, m));
}

MOE__K void MOE__(dequantize_f32)(const uint8_t *row, int64_t n, float *out) {
    memcpy(out, row, (size_t)n * sizeof(float));
}

MOE__V void u_dequantize_float(const uint8_t *row, int64_t n, float *out, const int type) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, u_load_weights(row + 2 * i, type));
    for (; i < n; i++) out[i] = u_load_weight(row + 2 * i, type);
}

MOE__K void MOE__(dequantize_f16)(const uint8_t *row, int64_t n, float *out) {
    u_dequantize_float(row, n, out, MOE__INDEX_F16);
}

MOE__K void MOE__(dequantize_bf16)(const uint8_t *row, int64_t n, float *out) {
    u_dequantize_float(row, n, out, MOE__INDEX_BF16);
}
#endif

// ---- pieces of vectors -----------------------------------------------------------------------

// pshufb index: copies of int16 number a of the low lane in the low lane, of number b of the
// high lane in the high one
MOE__V __m256i u_copy_i16(const int a, const int b) {
    const short copy_a = (short)(0x0100 + 0x0202 * a), copy_b = (short)(0x0100 + 0x0202 * b);
    return _mm256_inserti128_si256(u_set16(copy_a), _mm_set1_epi16(copy_b), 1);
}

// 16 bytes: 32 weights, the low nibbles before the high ones
MOE__V __m256i u_nibbles(const uint8_t *p) {
    __m256i x = _mm256_broadcastsi128_si256(v_load_128(p));
    x = _mm256_srlv_epi64(x, _mm256_setr_epi64x(0, 0, 4, 4));
    return _mm256_and_si256(x, u_set8(15));
}
// Bytes that are all ones where the bit is set
MOE__V __m256i u_mask(uint32_t bits) {
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                            0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i x = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte);
    return _mm256_cmpeq_epi8(_mm256_and_si256(x, bit), bit);
}
// Values 32 j .. 32 j + 31 of moe__act32.q
MOE__V __m256i u_act32(const int8_t *q, int j) {
    q += moe__act32_at(32 * j);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(v_load_128(q)), v_load_128(q + 64), 1);
}

// ---- types of 32-wide blocks -----------------------------------------------------------------

// Of the types here: bytes per block, where the nibbles are, log2 of the offset that makes
// levels unsigned, whether there are mins. `type` is always a constant index of the type table.
MOE__V int q32_size(const int type) { return moe__types[type].bytes; }
MOE__V int MOE__(q32_low)(const int type) {
    return type == MOE__INDEX_Q8_0 ? 2 : q32_size(type) - 16;
}
MOE__V int q32_shift(const int type) {
    return __builtin_ctz((unsigned)moe__types[type].offset | 256); // 8: has mins
}
MOE__V int MOE__(q32_min)(const int type) { return moe__types[type].offset == 0; }
// The 16 levels of MXFP4 and NVFP4, or of IQ4_NL, plus an offset, in every lane
MOE__V MOE__VI MOE__(q32_table)(const int type, const int offset) {
    const int8_t *table = type == MOE__INDEX_IQ4_NL ? moe__levels_k4 : moe__levels_fp4;
    return MOE__MM(add_epi8)(v_load16(table), v_set8((char)offset));
}
// v + add in bytes whose bit is set in x
MOE__V MOE__VI v_add_where(MOE__VI v, MOE__VI x, MOE__VI bit, const int add) {
    const MOE__VI y = v_set8((char)add);
#if MOE__ISA == 3
    return _mm512_mask_add_epi8(v, _mm512_test_epi8_mask(x, bit), v, y);
#else
    x = _mm256_cmpeq_epi8(_mm256_and_si256(x, bit), bit);
    return _mm256_add_epi8(v, _mm256_and_si256(x, y));
#endif
}
// Exponents of MXFP4, int32, as floats, see moe__types_e8m0: of e - 1 if that is above 0; shifts
// of more than 31 give 0
MOE__V MOE__VF v_e8m0(MOE__VI e) {
    const MOE__VI one = MOE__MM(set1_epi32)(1), tiny = MOE__MM(set1_epi32)(0x00400000);
    const MOE__VI usual = MOE__MM(slli_epi32)(MOE__MM(sub_epi32)(e, one), 23);
    const MOE__VI small = MOE__MM(srlv_epi32)(tiny, MOE__MM(sub_epi32)(one, e));
#if MOE__ISA == 3
    return _mm512_castsi512_ps(_mm512_max_epi32(usual, small));
#else
    return _mm256_castsi256_ps(_mm256_max_epi32(usual, small));
#endif
}

#if MOE__ISA == 3
// Lanes of four vectors turned: lane i of vector k to lane k of vector i
MOE__V void v_turn_lanes(const __m512i *x, __m512i *out) {
    const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44); // lanes 0 1
    const __m512i b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xEE); // lanes 2 3
    const __m512i d = _mm512_shuffle_i32x4(x[2], x[3], 0xEE);
    out[0] = _mm512_shuffle_i32x4(a, b, 0x88), out[1] = _mm512_shuffle_i32x4(a, b, 0xDD);
    out[2] = _mm512_shuffle_i32x4(c, d, 0x88), out[3] = _mm512_shuffle_i32x4(c, d, 0xDD);
}
#endif

#endif // MOE__ISA != 4

// ---- the scratch of tiles --------------------------------------------------------------------

// See "tiles" below.
#if MOE__ISA == 3
#define MOE__TILE_TOKENS 6
#else
#define MOE__TILE_TOKENS 4
#endif
#define MOE__PANEL (2 * MOE__VFLOATS) // rows of a micro-kernel

#if MOE__ISA != 4
enum {
    // The scratch: packs of the tile's panels, copies of rows, sums[token][32 rows].
    TILE_PACK = 256 * MOE__VBYTES, // bytes of one panel's pack
    MOE__(TILE_STAGE_AT) = 16384,
    TILE_SUMS_AT = 32768,
    MOE__(TILE_CHUNK) = (MOE__PACK_SIZE - 32768) / (MOE__TILE_ROWS * 4), // most tokens at once
    // A pack of quantized weights starts with their quads, [64][2 vectors]. Behind them, for 16
    // or 8 sub-blocks (ACT_Q256, ACT_Q32):
    TILE_SCALE = 128 * MOE__VBYTES, // int32 or f32 [sub-blocks][2 vectors]
    TILE_D = 160 * MOE__VBYTES, // f32 [2 vectors]: the scale of the integer scales
    TILE_DMIN = 162 * MOE__VBYTES, // f32 [2 vectors]: minus that of the integer mins
    TILE_MIN = 164 * MOE__VBYTES, // int16 pairs [sub-blocks / 2][2], or as scales
    MOE__(TILE_ACT) = 196 * MOE__VBYTES, // f32 [tokens][16]: sums of activations, negated
    TILE_START = 208 * MOE__VBYTES // int32 [tokens][16]: where sums start
};

// Stores a quad of half h of a panel's rows, and the rest of its pack.
MOE__V void tile_put(uint8_t *pack, int64_t quad, int64_t h, MOE__VI v) {
    v_store(pack + (2 * quad + h) * MOE__VBYTES, v);
}
MOE__V void tile_put_scale(uint8_t *pack, int64_t sub_block, int64_t h, MOE__VF v) {
    f_store(pack + TILE_SCALE + (2 * sub_block + h) * MOE__VBYTES, v);
}
MOE__V void tile_put_int(uint8_t *pack, int64_t sub_block, int64_t h, MOE__VI v) {
    v_store(pack + TILE_SCALE + (2 * sub_block + h) * MOE__VBYTES, v);
}
MOE__V void MOE__(tile_put_d)(uint8_t *pack, int64_t h, MOE__VF d) {
    f_store(pack + TILE_D + h * MOE__VBYTES, d);
}
MOE__V void MOE__(tile_put_dmin)(uint8_t *pack, int64_t h, MOE__VF dmin) {
    f_store(pack + TILE_DMIN + h * MOE__VBYTES,
                   MOE__MM(sub_ps)(MOE__MM(setzero_ps)(), dmin));
}
#endif // MOE__ISA != 4

// ---- quantized rows: levels ------------------------------------------------------------------

// A block of 256 weights is read as a head (d, scales, mins, shifts) and vectors of levels: vector
// v is the v-th of bytes level + bias, bias being the type's offset. (AVX2 multiplies unsigned
// bytes of at most 7 bits; 8-bit levels keep their signs there, bias 0.) All else is made from
// these two: products, tiles, floats. Where the bits are is said by the layouts in >>types, whose
// words are vectors here; "layouts read" below puts them together.
//
// Which weights a vector holds is the type's order. With 256 bits it is always the natural one.
// With 512 it is one in which neither levels nor activations have to be moved much: two
// sub-blocks of 32 weights (a, b), or four halves of such
//
//   FOURS    (0, 2) (1, 3) (4, 6) (5, 7), as moe__act256 has its activations
//   TWOS     (0, 4) (1, 5) (2, 6) (3, 7)
//   NATURAL  (0, 1) (2, 3) (4, 5) (6, 7)
//   HALVES   first halves of 0-3, second ones, the same of 4-7

#define MOE__LEVELS (256 / MOE__VBYTES) // vectors of levels
// AVX-VNNI has them from AVX2.

#if MOE__ISA != 4

// Where lane `lane` of vector v is from: the number of 16 weights
MOE__V int v_group(const int order, const int v, const int lane) {
#if MOE__ISA == 3
    const int half = lane / 2;
    if (order == MOE__HALVES) return 8 * (v / 2) + v % 2 + 2 * lane;
    if (order == MOE__FOURS) return 2 * (4 * (v / 2) + v % 2 + 2 * half) + lane % 2;
    if (order == MOE__TWOS) return 2 * (v + 4 * half) + lane % 2;
    return 4 * v + lane;
#else
    return (void)order, 2 * v + lane;
#endif
}

typedef struct MOE__(head) {
    __m256i scale, min; // int16, 16 of them or (of a type with 32 weights per scale) 8
    __m256i shift;      // likewise: to be added to the levels
    __m128 d;           // d, and dmin behind it
    uint16_t index[64]; // of code books' entries
    uint8_t sign[32];   // a bit per weight: negative
    const moe__books *books;
} MOE__(head);

// Activations in the order of vector v: FOURS is that of moe__act256
MOE__V MOE__VI v_acts(const int8_t *q, const int order, const int v) {
#if MOE__ISA == 3
    if (order == MOE__FOURS) return v_load(q + 64 * v);
    if (order == MOE__HALVES) {
        const __m512i at = v % 2 ? _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15)
                                 : _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
        return _mm512_permutex2var_epi64(v_load(q + 128 * (v / 2)), at,
                                         v_load(q + 128 * (v / 2) + 64));
    }
    const int a = moe__act256_at(16 * v_group(order, v, 0));
    const int b = moe__act256_at(16 * v_group(order, v, 2));
    return _mm512_inserti64x4(_mm512_castsi256_si512(v_load_256(q + a)), v_load_256(q + b), 1);
#else
    return (void)order, v_load(q + moe__act256_at(32 * v));
#endif
}

#if MOE__ISA == 3
// Which number per 16 (or per 32) weights each lane's is, times `ones`: in all its elements
MOE__V __m512i v_numbers(const int64_t ones, const int per, const int order, const int v) {
#define MOE__AT(lane) ones * (v_group(order, v, lane) / (per / 16))
    return _mm512_setr_epi64(MOE__AT(0), MOE__AT(0), MOE__AT(1), MOE__AT(1), MOE__AT(2), MOE__AT(2),
                             MOE__AT(3), MOE__AT(3));
#undef MOE__AT
}
#endif
// Number per 16 (or per 32) weights of x, int16, in the lanes they belong to
MOE__V MOE__VI v_spread(__m256i x, const int per, const int order, const int v) {
#if MOE__ISA == 3
    return _mm512_permutexvar_epi16(v_numbers(0x0001000100010001, per, order, v),
                                    _mm512_castsi256_si512(x));
#else
    const int by = per / 16;
    const int a = 2 * v / by, b = (2 * v + 1) / by;
    x = a < 8 ? _mm256_permute4x64_epi64(x, 0x44) : _mm256_permute4x64_epi64(x, 0xEE);
    return (void)order, _mm256_shuffle_epi8(x, u_copy_i16(a % 8, b % 8));
#endif
}

// Sums of two neighbouring products of levels and activations as int16, which holds them: at
// most 2 * 127 * 127 of levels of 7 bits. Those of 8 bits have their signs and are multiplied as
// |level| * (activation with the level's sign): at most 2 * 128 * 127. (512 bits have no such
// instruction, and do not come here with 8.)
MOE__V MOE__VI v_twos(MOE__VI levels, MOE__VI acts, const int bits) {
#if MOE__ISA == 2
    if (bits == 8) {
        acts = _mm256_sign_epi8(acts, levels);
        levels = _mm256_abs_epi8(levels);
    }
#endif
    (void)bits;
    return MOE__MM(maddubs_epi16)(levels, acts);
}
// acc + the sums of four neighbouring products
MOE__V MOE__VI v_quads(MOE__VI acc, MOE__VI levels, MOE__VI acts, const int bits) {
#if MOE__ISA == 3
    return (void)bits, _mm512_dpbusd_epi32(acc, levels, acts);
#else
    return v_dot_i16(acc, v_twos(levels, acts, bits), u_set16(1));
#endif
}

// acc + the sums of products of levels and activations times their scales
MOE__V MOE__VI v_multiply(MOE__VI acc, MOE__VI levels, MOE__VI acts, __m256i scale, const int bits,
                          const int per, const int order, const int v) {
#if MOE__ISA == 3
    if (bits == 8) {
        const __m512i sums = v_quads(_mm512_setzero_si512(), levels, acts, 8);
        const __m512i factor = _mm512_permutexvar_epi32(
            v_numbers(0x0000000100000001, per, order, v), _mm512_cvtepi16_epi32(scale));
        return _mm512_add_epi32(acc, _mm512_mullo_epi32(sums, factor));
    }
#endif
    return v_dot_i16(acc, v_twos(levels, acts, bits), v_spread(scale, per, order, v));
}

// The sum of x * (sum of activations) over all scales, spread over a vector
MOE__V __m256i u_times_sums(__m256i x, const moe__act256 *a, const int per) {
    if (per == 16) return _mm256_madd_epi16(x, v_load_256(a->sum16));
    return _mm256_zextsi128_si256(_mm_madd_epi16(_mm256_castsi256_si128(x), v_load_128(a->sum32)));
}
MOE__V MOE__VI v_extend(__m256i x) {
#if MOE__ISA == 3
    return _mm512_zextsi256_si512(x);
#else
    return x;
#endif
}

// ---- parts of levels

// int16 shifted right by n, left by -n
MOE__V MOE__VI v_shift(MOE__VI x, const int n) {
    return n >= 0 ? MOE__MM(srli_epi16)(x, n) : MOE__MM(slli_epi16)(x, -n);
}
// Fields of `bits` bits, moved to bit `to` of each byte: each 32 bytes hold as many sub-blocks
// of 32 weights as fit, the first in the low bits. The other bits are not cleared.
MOE__V MOE__VI v_field(const uint8_t *p, const int bits, const int to, const int order,
                       const int v) {
    const int fit = 8 / bits;
#if MOE__ISA == 3
    const int a = v_group(order, v, 0) / 2, b = v_group(order, v, 2) / 2;
    if (a / fit != b / fit) return v_shift(v_load(p + 32 * (a / fit)), bits * (a % fit) - to);
    const __m512i by = _mm512_inserti64x4(_mm512_set1_epi64(bits * (a % fit) - to + 64),
                                          _mm256_set1_epi64x(bits * (b % fit) - to + 64), 1);
    return _mm512_rorv_epi64(_mm512_broadcast_i64x4(v_load_256(p + 32 * (a / fit))), by);
#else
    (void)order;
    return v_shift(v_load(p + 32 * (v / fit)), bits * (v % fit) - to);
#endif
}
MOE__V MOE__VI v_mask(MOE__VI x, const int mask) {
    return v_and(x, v_set8((char)mask));
}
// low | `bits` bits of high from bit `at` on
MOE__V MOE__VI v_join(MOE__VI low, MOE__VI high, const int bits, const int at) {
    return v_or_and(low, high, v_set8((char)(((1 << bits) - 1) << at)));
}
// table[x] + bias, of 4, 8, 16, 32 or 64 entries
MOE__V MOE__VI v_table(const int8_t *table, const int n, const int bias) {
    const MOE__VI add = v_set8((char)bias);
    if (n == 4) return MOE__MM(add_epi8)(MOE__MM(set1_epi32)((int)moe__load_u32(table)), add);
#if MOE__ISA == 3
    if (n == 8) return _mm512_add_epi8(_mm512_set1_epi64((int64_t)moe__load_u64(table)), add);
#else
    if (n == 8) return _mm256_add_epi8(_mm256_set1_epi64x((int64_t)moe__load_u64(table)), add);
#endif
    return MOE__MM(add_epi8)(v_load16(table), add);
}
MOE__V MOE__VI v_lookup(const int8_t *table, MOE__VI x, const int n, const int bias) {
    MOE__VI y = MOE__MM(shuffle_epi8)(v_table(table, n, bias), x);
#if MOE__ISA == 3
    if (n > 16) {
        const __mmask64 odd = _mm512_test_epi8_mask(x, _mm512_set1_epi8(16));
        y = _mm512_mask_shuffle_epi8(y, odd, v_table(table + 16, 16, bias), x);
        if (n > 32) {
            __m512i z = _mm512_shuffle_epi8(v_table(table + 32, 16, bias), x);
            z = _mm512_mask_shuffle_epi8(z, odd, v_table(table + 48, 16, bias), x);
            y = _mm512_mask_blend_epi8(_mm512_test_epi8_mask(x, _mm512_set1_epi8(32)), y, z);
        }
    }
#else
    MOE__UNROLL(4)
    for (int i = 1; i < n / 16; i++) {
        const __m256i here = _mm256_cmpgt_epi8(x, u_set8((char)(16 * i - 1)));
        const __m256i z = _mm256_shuffle_epi8(v_table(table + 16 * i, 16, bias), x);
        y = _mm256_blendv_epi8(y, z, here);
    }
#endif
    return y;
}
// Tables of 8-bit levels: see `bias` above
#define MOE__BIAS8 (MOE__ISA == 3 ? 128 : 0)
#define MOE__BIAS(NAME) (MOE__ISA == 2 && MOE__BITS_##NAME == 8 ? 0 : MOE__OFFSET_##NAME)

// ---- words: levels

// The words of the layouts in >>types, of whole vectors: w_ a vector of levels, s_ all scales of
// a block as int16, 16 or 8 of them (n), d_ d and dmin behind it.
#define MOE__READER(type, name, ...) \
    MOE__V type MOE__(name)(const uint8_t *b MOE__UNUSED, __VA_ARGS__)
#define MOE__W(name, ...) \
    MOE__READER(MOE__VI, w_##name, __VA_ARGS__, const int order MOE__UNUSED, const int v)
#define MOE__S(name, ...) MOE__READER(__m256i, s_##name, __VA_ARGS__, const int n MOE__UNUSED)
#define MOE__SET(name, ...) MOE__READER(__m128, d_##name, __VA_ARGS__, float D MOE__UNUSED)
MOE__W(two, int p) { return v_mask(v_field(b + p, 2, 0, order, v), 3); }
MOE__W(four, int p) { return v_mask(v_field(b + p, 4, 0, order, v), 15); }
MOE__W(three, int two, int one) {
    const MOE__VI x = MOE__(w_two)(b, two, order, v);
    return v_join(x, v_field(b + one, 1, 2, order, v), 1, 2);
}
MOE__W(five, int four, int one) {
    const MOE__VI x = MOE__(w_four)(b, four, order, v);
    return v_join(x, v_field(b + one, 1, 4, order, v), 1, 4);
}
MOE__W(six, int four, int two) {
    const MOE__VI x = MOE__(w_four)(b, four, order, v);
    return v_join(x, v_field(b + two, 2, 4, order, v), 2, 4);
}
MOE__W(six_64, int p, int two) {
    const uint8_t *at = b + p + 32 * (v % 2); // FOURS
#if MOE__ISA == 3
    const __m512i by = _mm512_inserti64x4(_mm512_setzero_si512(), u_set16(4), 1);
    const __m512i both = _mm512_broadcast_i64x4(v_load_256(at + 64 * (v / 2)));
    const __m512i low = _mm512_srlv_epi16(both, by);
#else
    const __m256i low = _mm256_srli_epi16(v_load(at + 64 * (v / 4)), v / 2 % 2 * 4);
#endif
    return v_join(v_mask(low, 15), v_field(b + two, 2, 4, order, v), 2, 4);
}
MOE__W(nibbles, int p) { // HALVES
#if MOE__ISA == 3
    return v_mask(_mm512_srli_epi16(v_load(b + p + 64 * (v / 2)), 4 * (v % 2)), 15);
#else
    return u_nibbles(b + p + 16 * v);
#endif
}
#if MOE__ISA == 2
MOE__W(nibbles_one, int p, int one) {
    return v_join(MOE__(w_nibbles)(b, p, order, v), u_mask(moe__load_u32(b + one)), 1, 4);
}
MOE__W(nibbles_two, int p, int two) {
    __m256i x = _mm256_set1_epi64x((int64_t)moe__load_u64(b + two));
    x = _mm256_and_si256(_mm256_srlv_epi64(x, _mm256_setr_epi64x(0, 4, 2, 6)),
                         u_set8(3));
    return _mm256_or_si256(MOE__(w_nibbles)(b, p, order, v), _mm256_slli_epi16(x, 4));
}
MOE__W(int8, int p) { return v_load_256(b + p + 32 * v); } // bias 0
#endif
// Sub-block j: bytes, and the powers of 3 they are multiplied with
MOE__V __m256i MOE__(base3_bytes)(const uint8_t *b, const int j) {
    if (j < 5) return v_load_256(b);
    const __m256i x = _mm256_broadcastsi128_si256(v_load_128(b + 32));
    if (j < 7) return x;
    return _mm256_inserti128_si256(x, _mm_set1_epi32((int)moe__load_u32(b + 48)), 1);
}
MOE__V __m256i MOE__(base3_powers)(const int j) {
    const int power[5] = {1, 3, 9, 27, 81};
    if (j < 5) return u_set16((short)power[j]);
    const __m128i a = _mm_set1_epi16((short)power[2 * (j - 5) % 5]);
    const __m128i c = j == 7 ? _mm_setr_epi16(1, 1, 3, 3, 9, 9, 27, 27)
                             : _mm_set1_epi16((short)power[2 * (j - 5) + 1]);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(a), c, 1);
}
// x = byte * 3^i modulo 256; the digit is 3 x / 256: two comparisons
MOE__W(base3, int p) {
#if MOE__ISA == 3
#define MOE__BOTH(x, y) _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1)
    const int i = v_group(order, v, 0) / 2, j = v_group(order, v, 2) / 2;
    const __m512i bytes = MOE__BOTH(MOE__(base3_bytes)(b + p, i), MOE__(base3_bytes)(b + p, j));
    const __m512i power = MOE__BOTH(MOE__(base3_powers)(i), MOE__(base3_powers)(j));
#undef MOE__BOTH
#else
    const __m256i bytes = MOE__(base3_bytes)(b + p, v), power = MOE__(base3_powers)(v);
#endif
    const MOE__VI high = v_set16((short)0xFF00);
    const MOE__VI odd = MOE__MM(mullo_epi16)(v_and(bytes, high), power);
    const MOE__VI x =
        v_or_and(odd, MOE__MM(mullo_epi16)(bytes, power), v_set16(0x00FF));
    const MOE__VI one = v_set8(86), two = v_set8((char)171);
#if MOE__ISA == 3
    const __m512i y = _mm512_maskz_set1_epi8(_mm512_cmpge_epu8_mask(x, one), 1);
    return _mm512_mask_add_epi8(y, _mm512_cmpge_epu8_mask(x, two), y, _mm512_set1_epi8(1));
#else
    const __m256i y = _mm256_add_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(x, one), x),
                                      _mm256_cmpeq_epi8(_mm256_max_epu8(x, two), x));
    return _mm256_sub_epi8(_mm256_setzero_si256(), y);
#endif
}
// An index stands for two weights.
MOE__W(pairs, int p, int one) {
#if MOE__ISA == 3
    const __m512i first = _mm512_cvtepi8_epi16(v_load_256(moe__levels_kl[0]));
    const __m512i second = _mm512_cvtepi8_epi16(v_load_256(moe__levels_kl[1]));
    const __m512i pairs = _mm512_or_si512( // levels + 64: bytes of each word
        _mm512_add_epi16(first, _mm512_set1_epi16(64)),
        _mm512_slli_epi16(_mm512_add_epi16(second, _mm512_set1_epi16(64)), 8));
    const __m256i x = u_nibbles(b + p + 16 * v);
    __m256i high = _mm256_broadcastsi128_si256(v_load_128(b + one));
    high = _mm256_srlv_epi64(high, _mm256_setr_epi64x(2 * v, 2 * v, 2 * v + 1, 2 * v + 1));
    high = _mm256_and_si256(_mm256_slli_epi16(high, 4), u_set8(16));
    return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm256_or_si256(x, high)), pairs);
#else
    const __m128i low = _mm_set1_epi8(15), bit = _mm_set1_epi8(1);
    __m128i x = _mm_srli_epi16(v_load_128(b + p + 16 * (v / 2)), 4 * (v % 2));
    __m128i high = _mm_srli_epi16(v_load_128(b + one), v);
    high = _mm_slli_epi16(_mm_and_si128(high, bit), 4);
    __m256i index = _mm256_castsi128_si256(_mm_or_si128(_mm_and_si128(x, low), high));
    __m128i y = _mm256_castsi256_si128(v_lookup(moe__levels_kl[0], index, 32, 64));
    __m128i z = _mm256_castsi256_si128(v_lookup(moe__levels_kl[1], index, 32, 64));
    __m256i both = _mm256_castsi128_si256(_mm_unpacklo_epi8(y, z));
    return _mm256_inserti128_si256(both, _mm_unpackhi_epi8(y, z), 1);
#endif
}

// ---- words: scales

MOE__V __m256i u_words(__m128i bytes) { return _mm256_cvtepu8_epi16(bytes); }
// One or two f16 (of n bytes)
MOE__V __m128 u_halves(const uint8_t *p, const int n) {
    return _mm_cvtph_ps(_mm_cvtsi32_si128(n == 4 ? (int)moe__load_u32(p) : moe__load_u16(p)));
}
// 8 bytes of nibbles as 16 int16: the low one of a byte before its high one (pairs), or all low
// ones first; 4 bytes as 8 int16
MOE__V __m256i u_nibbles16(const uint8_t *p, const int n, const int pairs) {
    __m128i x = n == 16 ? _mm_loadl_epi64((const __m128i *)(const void *)p)
                        : _mm_cvtsi32_si128((int)moe__load_u32(p));
    __m128i high = _mm_and_si128(_mm_srli_epi16(x, 4), _mm_set1_epi8(15));
    x = _mm_and_si128(x, _mm_set1_epi8(15));
    if (pairs) return u_words(_mm_unpacklo_epi8(x, high));
    return u_words(n == 16 ? _mm_unpacklo_epi64(x, high) : _mm_unpacklo_epi32(x, high));
}
// Bit i of x as int16 number i: `on` where it is set, else 0
MOE__V __m256i u_bits16(int x, const int on) {
    const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                          8192, 16384, (short)-32768);
    const __m256i set = _mm256_cmpeq_epi16(
        _mm256_and_si256(u_set16((short)x), bit), bit);
    return _mm256_and_si256(set, u_set16((short)on));
}
// Pairs of bits as bits 4 and 5 of n int16
MOE__V __m256i u_pairs16(const uint8_t *p, const int n) {
    if (n == 8) { // pair i to the two top bits, then to bits 4 and 5
        const __m128i factor = _mm_setr_epi16(16384, 4096, 1024, 256, 64, 16, 4, 1);
        __m128i y = _mm_mullo_epi16(_mm_set1_epi16((short)moe__load_u16(p)), factor);
        y = _mm_and_si128(_mm_srli_epi16(y, 10), _mm_set1_epi16(48));
        return _mm256_castsi128_si256(y);
    }
    // a product moves bits 2 k of each byte to bits 6 and 7
    const __m128i byte = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m256i factor = _mm256_set1_epi64x(0x0001000400100040);
    const __m128i bytes = _mm_shuffle_epi8(_mm_cvtsi32_si128((int)moe__load_u32(p)), byte);
    const __m256i high = _mm256_mullo_epi16(u_words(bytes), factor);
    return _mm256_and_si256(_mm256_srli_epi16(high, 2), u_set16(48));
}
MOE__V __m256i u_add16(__m256i x, const int y) {
    return _mm256_add_epi16(x, u_set16((short)y));
}
// 2 x + 1
MOE__V __m256i u_odd16(__m256i x) { return u_add16(_mm256_add_epi16(x, x), 1); }

MOE__S(one, int p) { return (void)p, u_set16(1); }
MOE__S(int8, int p) { return _mm256_cvtepi8_epi16(v_load_128(b + p)); }
MOE__S(low, int p) { return u_words(_mm_and_si128(v_load_128(b + p), _mm_set1_epi8(15))); }
MOE__S(high, int p) {
    return u_words(_mm_and_si128(_mm_srli_epi16(v_load_128(b + p), 4), _mm_set1_epi8(15)));
}
MOE__S(four, int p) { return u_add16(u_nibbles16(b + p, n, 1), -8); }
MOE__S(odd, int p) { return u_odd16(u_nibbles16(b + p, n, 1)); }
MOE__S(odd_signed, int p, int signs) {
    const __m256i sign = u_bits16(moe__load_u16(b + signs), -1);
    return _mm256_sub_epi16(_mm256_xor_si256(MOE__(s_odd)(b, p, n), sign), sign);
}
MOE__S(five, int p, int one) {
    return u_add16(_mm256_or_si256(u_nibbles16(b + p, n, 1), u_bits16(b[one], 16)), -16);
}
MOE__S(five_halves, int p, int one) {
    return u_add16(_mm256_or_si256(u_nibbles16(b + p, n, 0), u_bits16(b[one], 16)), -16);
}
MOE__S(six, int p, int two) {
    return u_add16(_mm256_or_si256(u_nibbles16(b + p, n, 1), u_pairs16(b + two, n)), -32);
}
MOE__S(six_halves, int p, int two) {
    return u_add16(_mm256_or_si256(u_nibbles16(b + p, n, 0), u_pairs16(b + two, n)), -32);
}
MOE__S(six_split, int p, int two) {
    __m128i high = _mm_srlv_epi32(_mm_set1_epi32((int)moe__load_u32(b + two)),
                                  _mm_setr_epi32(0, 2, 4, 6));
    high = _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(3)), 4);
    return u_add16(_mm256_or_si256(u_nibbles16(b + p, n, 0), u_words(high)), -32);
}
// Outside the vector units, which are busy
MOE__S(six_k, int p, int mins) {
    const uint32_t x = moe__load_u32(b + p + 4 * mins), z = moe__load_u32(b + p + 8);
    const uint32_t low = 0x0F0F0F0F, top = 0x30303030, six = 0x3F3F3F3F;
    const uint32_t second = ((mins ? z >> 4 : z) & low) | (x >> 2 & top);
    return u_words(_mm_cvtsi64_si128((int64_t)((x & six) | (uint64_t)second << 32)));
}
MOE__S(even, int p) {
    const __m256i x = u_words(_mm_loadl_epi64((const __m128i *)(const void *)(b + p)));
    return u_add16(_mm256_sub_epi16(x, _mm256_and_si256(x, u_set16(1))), -127);
}
MOE__S(lowest, int p, int by) {
    const __m256i x = u_words(_mm_loadl_epi64((const __m128i *)(const void *)(b + p)));
    const __m256i bit = _mm256_and_si256(x, u_set16(1));
    return _mm256_and_si256(_mm256_sub_epi16(_mm256_setzero_si256(), bit),
                            u_set16((short)by));
}
MOE__S(bits, int p, int by) { return u_bits16(n == 16 ? moe__load_u16(b + p) : b[p], by); }

MOE__SET(half, int p) { return u_halves(b + p, 2); }
MOE__SET(halves, int p) { return u_halves(b + p, 4); }
MOE__SET(half_min, int p) { return MOE__(d_halves)(b, p, D); }
MOE__SET(e8m0, int p) { return _mm_set_ss(moe__types_e8m0(b[p])); }
MOE__SET(row, int p) { return (void)p, _mm_set_ss(D); }

#define MOE__HEAD(name)                                                                      \
    MOE__V void MOE__(head_##name)(const uint8_t *b, float D __attribute__((unused)),        \
                                   MOE__(head) *h)
#define MOE__LEVEL(name)                                                                     \
    MOE__V MOE__VI MOE__(level_##name)(const uint8_t *b __attribute__((unused)), const int v, \
                                       const MOE__(head) *h __attribute__((unused)))

// ---- code books

// Types with an index for 4 or 8 levels at once (IQ1, IQ2, IQ3). The head of a block unpacks all
// indices and signs; a vector of levels is then looked up entry by entry and gets its signs.
// Code books' vectors are in the order FOURS. Entries of vector v, of a book of 8 bytes each:
MOE__V MOE__VI v_book8(const uint64_t *book, const uint16_t *index, const int v) {
#define MOE__ENTRY(lane, i) \
    (int64_t)book[index[2 * v_group(MOE__FOURS, v, lane) + (i)]]
#if MOE__ISA == 3
    return _mm512_setr_epi64(MOE__ENTRY(0, 0), MOE__ENTRY(0, 1), MOE__ENTRY(1, 0),
                             MOE__ENTRY(1, 1), MOE__ENTRY(2, 0), MOE__ENTRY(2, 1),
                             MOE__ENTRY(3, 0), MOE__ENTRY(3, 1));
#else
    return _mm256_setr_epi64x(MOE__ENTRY(0, 0), MOE__ENTRY(0, 1), MOE__ENTRY(1, 0),
                              MOE__ENTRY(1, 1));
#endif
#undef MOE__ENTRY
}
// The signs of the vectors, from those of the weights
MOE__V void u_signs_book8(__m256i sign, MOE__(head) *h) {
#if MOE__ISA == 3
    sign = _mm256_permutevar8x32_epi32(sign, _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7));
#endif
    u_store(h->sign, sign);
}
// bias + x, or bias - x where its sign is set
MOE__V MOE__VI v_signed(MOE__VI x, const uint8_t *sign, const int v, const int bias) {
    const MOE__VI zero = v_set8((char)bias);
#if MOE__ISA == 3
    return _mm512_mask_sub_epi8(_mm512_add_epi8(zero, x),
                                (__mmask64)moe__load_u64(sign + 8 * v), zero, x);
#else
    const __m256i on = u_mask(moe__load_u32(sign + 4 * v));
    return _mm256_add_epi8(_mm256_sub_epi8(_mm256_xor_si256(x, on), on), zero);
#endif
}
// The eighth sign makes their number even: 32 bytes of 7 bits to 8.
MOE__V __m256i u_even_signs(__m256i x) {
    const __m256i odd = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
    const __m256i low = u_set8(15);
    const __m256i fold = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi16(x, 4)), low);
    return _mm256_or_si256(x, _mm256_shuffle_epi8(odd, fold));
}
// Eight words of four 7-bit signs and a 4-bit scale; returns the signs
MOE__V __m256i u_signs_scales(__m256i words, MOE__(head) *h) {
    __m256i x = _mm256_and_si256(words, _mm256_set1_epi32(0x7F));
    x = u_or_and(x, _mm256_slli_epi32(words, 1), _mm256_set1_epi32(0x7F00));
    x = u_or_and(x, _mm256_slli_epi32(words, 2), _mm256_set1_epi32(0x7F0000));
    x = u_or_and(x, _mm256_slli_epi32(words, 3), _mm256_set1_epi32(0x7F000000));
    const __m256i scale = _mm256_srli_epi32(words, 28);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(scale),
                                            _mm256_extracti128_si256(scale, 1));
    h->scale = u_odd16(_mm256_castsi128_si256(packed));
    return u_even_signs(x);
}
// Indices are read back one by one: GCC would take them out of the registers instead.
MOE__V void u_store_indices(__m256i low, __m256i high, MOE__(head) *h) {
    u_store(h->index, low);
    u_store(h->index + 16, high);
    __asm__("" : "+m"(h->index));
}
// 32 bytes as indices, with a high part
MOE__V void u_indices(const uint8_t *p, __m256i high0, __m256i high1, MOE__(head) *h) {
    const __m256i a = u_words(v_load_128(p));
    const __m256i b = u_words(v_load_128(p + 16));
    u_store_indices(_mm256_or_si256(a, high0), _mm256_or_si256(b, high1), h);
}
// Int16 numbers n .. n + 3 of x, each four times
MOE__V __m256i u_fours16(__m128i x, const int n) {
    const __m256i at = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3,
                                        4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(x),
                               _mm256_add_epi8(at, u_set8((char)(2 * n))));
}

MOE__HEAD(iq2_xxs) {
    const __m256 x = _mm256_loadu_ps((const float *)(const void *)(b + 2));
    const __m256 y = _mm256_loadu_ps((const float *)(const void *)(b + 34));
    __m256i words = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xDD)); // 0 1 4 5 2 3 6 7
    __m256i bytes = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88));
    u_signs_book8(u_signs_scales(_mm256_permute4x64_epi64(words, 0xD8), h), h);
    bytes = _mm256_permute4x64_epi64(bytes, 0xD8);
    u_store_indices(u_words(_mm256_castsi256_si128(bytes)),
                    u_words(_mm256_extracti128_si256(bytes, 1)), h);
    h->d = _mm_set_ss(u_f16(b) * 0.125f);
}
MOE__LEVEL(iq2_xxs) {
    const MOE__VI x = v_book8(h->books->iq2xxs, h->index, v);
    return v_signed(x, h->sign, v, 64);
}

MOE__HEAD(iq2_xs) {
    const __m256i x = v_load_256(b + 2), y = v_load_256(b + 34);
    const __m256i mask = u_set16(511);
    __m256i sign = _mm256_packus_epi16(_mm256_srli_epi16(x, 9), _mm256_srli_epi16(y, 9));
    u_signs_book8(u_even_signs(_mm256_permute4x64_epi64(sign, 0xD8)), h);
    u_store_indices(_mm256_and_si256(x, mask), _mm256_and_si256(y, mask), h);
    h->scale = MOE__(s_odd)(b, 66, 16);
    h->d = _mm_set_ss(u_f16(b) * 0.125f);
}
MOE__LEVEL(iq2_xs) {
    const MOE__VI x = v_book8(h->books->iq2xs, h->index, v);
    return v_signed(x, h->sign, v, 64);
}

MOE__HEAD(iq2_s) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(b + 66));
    const __m128i high = _mm_cvtepu8_epi16(bytes); // four pairs of bits
    const __m256i up = _mm256_set1_epi64x(0x0004001000400100), mask = u_set16(0x300);
    const __m256i low_half = _mm256_mullo_epi16(u_fours16(high, 0), up);
    const __m256i high_half = _mm256_mullo_epi16(u_fours16(high, 4), up);
    u_indices(b + 2, _mm256_and_si256(low_half, mask), _mm256_and_si256(high_half, mask), h);
    u_signs_book8(v_load_256(b + 34), h);
    h->scale = MOE__(s_odd)(b, 74, 16);
    h->d = _mm_set_ss(u_f16(b) * 0.125f);
}
MOE__LEVEL(iq2_s) {
    const MOE__VI x = v_book8(h->books->iq2s, h->index, v);
    return v_signed(x, h->sign, v, 64);
}

// Books of 256 or 512 entries of 4 bytes. With 512 bits halves of entries are looked up in
// vectors (moe__books.iq3xxs_16 and iq3s_16); their order is HALVES then. Otherwise they are
// loaded one by one.
#if MOE__ISA == 3
// table[x] of `count` words, for 32 words x
MOE__V __m512i v_lookup_16(const uint16_t *table, __m512i x, const int count) {
    __m512i y[8];
    MOE__UNROLL(8)
    for (int i = 0; i < count / 64; i++)
        y[i] = _mm512_permutex2var_epi16(v_load(table + 64 * i), x, v_load(table + 64 * i + 32));
    MOE__UNROLL(4)
    for (int n = 64; n < count; n *= 2) {
        const __mmask32 odd = _mm512_test_epi16_mask(x, _mm512_set1_epi16((short)n));
        MOE__UNROLL(4)
        for (int i = 0; i < count / n / 2; i++)
            y[i] = _mm512_mask_blend_epi16(odd, y[2 * i], y[2 * i + 1]);
    }
    return y[0];
}
// The signs of the vectors, from those of the weights: words 0 2 4 6 1 3 5 7 of each eight
MOE__V void u_signs_book4(__m256i sign, MOE__(head) *h) {
    const __m256i words = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    u_store(h->sign, _mm256_shuffle_epi8(sign, words));
}
MOE__V __m512i v_book4(const uint16_t *book, __m512i index, const int count, const int v) {
    const __m512i low = v_lookup_16(book, index, count);
    const __m512i high = v_lookup_16(book + count, index, count);
    return v % 2 ? _mm512_unpackhi_epi16(low, high) : _mm512_unpacklo_epi16(low, high);
}
#else
MOE__V void u_signs_book4(__m256i sign, MOE__(head) *h) { u_store(h->sign, sign); }
#define MOE__ENTRY(i) (int)book[index[i]]
#define MOE__ENTRIES                                                                         \
    _mm256_setr_epi32(MOE__ENTRY(0), MOE__ENTRY(1), MOE__ENTRY(2), MOE__ENTRY(3),            \
                      MOE__ENTRY(4), MOE__ENTRY(5), MOE__ENTRY(6), MOE__ENTRY(7))
MOE__V __m256i v_book4(const uint32_t *book, const uint8_t *index) { return MOE__ENTRIES; }
MOE__V __m256i v_book4_16(const uint32_t *book, const uint16_t *index) { return MOE__ENTRIES; }
#undef MOE__ENTRIES
#undef MOE__ENTRY
#endif

MOE__HEAD(iq3_xxs) {
    u_signs_book4(u_signs_scales(v_load_256(b + 66), h), h);
    h->d = _mm_set_ss(u_f16(b) * 0.25f);
}
MOE__LEVEL(iq3_xxs) {
#if MOE__ISA == 3
    const __m512i index = _mm512_cvtepu8_epi16(v_load_256(b + 2 + 32 * (v / 2)));
    const __m512i x = v_book4(h->books->iq3xxs_16[0], index, 256, v);
#else
    const __m256i x = v_book4(h->books->iq3xxs, b + 2 + 8 * v);
#endif
    return v_signed(x, h->sign, v, 64);
}

MOE__HEAD(iq3_s) {
    h->scale = MOE__(s_odd)(b, 106, 8);
    u_signs_book4(v_load_256(b + 74), h);
#if MOE__ISA == 2
    MOE__UNROLL(4)
    for (int i = 0; i < 4; i++) { // 16 indices and their ninth bits
        const __m256i low = u_words(v_load_128(b + 2 + 16 * i));
        const __m256i high = u_bits16(moe__load_u16(b + 66 + 2 * i), 256);
        u_store(h->index + 16 * i, _mm256_or_si256(low, high));
    }
    __asm__("" : "+m"(h->index));
#endif
    h->d = u_halves(b, 2);
}
MOE__LEVEL(iq3_s) {
#if MOE__ISA == 3
    __m512i index = _mm512_cvtepu8_epi16(v_load_256(b + 2 + 32 * (v / 2)));
    index = _mm512_mask_add_epi16(index, moe__load_u32(b + 66 + 4 * (v / 2)), index,
                                  _mm512_set1_epi16(256));
    const __m512i x = v_book4(h->books->iq3s_16[0], index, 512, v);
#else
    const __m256i x = v_book4_16(h->books->iq3s, h->index + 8 * v);
#endif
    return v_signed(x, h->sign, v, 16);
}

// Levels -8, 0 or 8, and one more or less
MOE__HEAD(iq1_s) {
    const __m128i words = v_load_128(b + 34); // four times 3 bits, a scale, a sign
    const __m256i up = _mm256_set1_epi64x(0x0001000800400200);
    const __m256i mask = u_set16(0x700);
    const __m256i low = _mm256_mullo_epi16(u_fours16(words, 0), up);
    const __m256i high = _mm256_mullo_epi16(u_fours16(words, 4), up);
    // 3 bits from 0, 3, 6 or 9 on are at 9 now, bit 15 is lost
    u_indices(b + 2, _mm256_and_si256(_mm256_srli_epi16(low, 1), mask),
              _mm256_and_si256(_mm256_srli_epi16(high, 1), mask), h);
    const __m128i scale = _mm_and_si128(_mm_srli_epi16(words, 12), _mm_set1_epi16(7));
    h->scale = u_odd16(_mm256_castsi128_si256(scale));
    h->shift = _mm256_castsi128_si256(_mm_or_si128(_mm_srai_epi16(words, 15), _mm_set1_epi16(1)));
    h->d = _mm_set_ss(u_f16(b) * 0.125f);
}
MOE__LEVEL(iq1_s) {
    const MOE__VI x = v_book8(h->books->iq1s, h->index, v);
    return MOE__MM(add_epi8)(x, v_set8(16));
}

MOE__HEAD(iq1_m) {
    const __m128i words = v_load_128(b + 32); // four nibbles each: 3 bits, a sign
    const __m256i up = _mm256_set1_epi64x(0x0001001001001000), mask = u_set16(7);
    const __m256i low = _mm256_srli_epi16(_mm256_mullo_epi16(u_fours16(words, 0), up), 12);
    const __m256i high = _mm256_srli_epi16(_mm256_mullo_epi16(u_fours16(words, 4), up), 12);
    u_indices(b, _mm256_slli_epi16(_mm256_and_si256(low, mask), 8),
              _mm256_slli_epi16(_mm256_and_si256(high, mask), 8), h);
    const __m256i nibbles = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
    uint32_t signs =
        (uint32_t)_mm256_movemask_epi8(_mm256_cmpgt_epi8(nibbles, u_set8(7)));
#if MOE__ISA == 3
    signs = (signs & 0xF00FF00F) | (signs & 0x00F000F0) << 4 | (signs >> 4 & 0x00F000F0);
#endif
    memcpy(h->sign, &signs, 4); // a bit per entry, in the order of the vectors
    __m256i scale = u_fours16(_mm_loadl_epi64((const __m128i *)(const void *)(b + 48)), 0);
    scale = _mm256_mullo_epi16(scale, _mm256_set1_epi64x(0x0001000800400200));
    h->scale = u_odd16(_mm256_and_si256(_mm256_srli_epi16(scale, 9), mask));
    h->d = _mm_set_ss(moe__types_iq1_m_d(b + 48) * 0.125f);
}
MOE__LEVEL(iq1_m) {
    const MOE__VI x = v_book8(h->books->iq1s, h->index, v);
    const MOE__VI more = v_set8(17), less = v_set8(15);
#if MOE__ISA == 3
    return _mm512_add_epi8(x, _mm512_mask_mov_epi64(more, h->sign[v], less));
#else
    const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i on = _mm256_set1_epi64x(h->sign[v / 2] >> 4 * (v % 2));
    const __m256i minus = _mm256_cmpeq_epi64(_mm256_and_si256(on, bit), bit);
    return _mm256_add_epi8(x, _mm256_blendv_epi8(more, less, minus));
#endif
}

// ---- dot products: blocks of 256 -------------------------------------------------------------

// Per block of a row: its head; then each vector of levels times the activations, summed in int32
// to sub-blocks and multiplied with their scales, all in one vector of integers; then one product
// of floats with the block's d and the activations' scale. Mins are multiplied with the sums of
// activations that quantizing has left in the record. Bias and shift of levels cost no work per
// weight: (level + bias) . act = level . act + bias * sum of act.

// Lanes added up: every second of four, all of them
MOE__V __m256i u_rows_8(MOE__VI x) {
#if MOE__ISA == 3
    return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
#else
    return x;
#endif
}
MOE__V __m128i u_rows_4(MOE__VI x) {
    const __m256i y = u_rows_8(x);
    return _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}

// total + a block whose products and mins are the sums over two vectors, as moe__dot_256 does.
// d: d, dmin; per: weights per min, 32: only the low half of mins is not 0
MOE__V __m128 u_add_block(__m128 total, MOE__VI products, __m256i mins, __m128 d, float act,
                          const int has_mins, const int per) {
    __m128i x = u_rows_4(products), y = _mm256_castsi256_si128(mins);
    __m128 part;
    if (has_mins) {
        if (per == 16) y = _mm_add_epi32(y, _mm256_extracti128_si256(mins, 1));
        x = _mm_hadd_epi32(x, y);
        x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1)); // dword 0: products, 2: mins
        const __m128 both = _mm_cvtepi32_ps(x);
        part = _mm_fnmadd_ss(_mm_movehl_ps(both, both), _mm_movehdup_ps(d), _mm_mul_ss(both, d));
    } else {
        x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
        x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1));
        part = _mm_mul_ss(_mm_cvtepi32_ps(x), d);
    }
    return _mm_fmadd_ss(part, _mm_set_ss(act), total);
}

MOE__V float u_row_scale(const uint8_t *row, const int meta) {
    return meta == 4 ? moe__load_f32(row) : meta == 2 ? u_f16(row) : 1;
}
// Numbers per 32 weights as numbers per 16
MOE__V __m256i u_per_16(__m256i x, const int per) {
    if (per == 16) return x;
    const __m128i y = _mm256_castsi256_si128(x);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(y, y)),
                                   _mm_unpackhi_epi16(y, y), 1);
}

// A type of 256-wide blocks: MOE__HEAD and MOE__LEVEL as dot and unpack. With code books heads
// are read some blocks ahead: their indices go through memory, which takes its time. unpack
// writes the levels with their bias and shifts, in the order of the vectors. What a type has:
// shifts of levels, code books
#define MOE__SHIFTS 1
#define MOE__BOOKS 2
#define MOE__MINS 4
#define MOE__TYPE_256(NAME, name, order, has)                                                     \
    MOE__K void MOE__(dot_##name)(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n, \
                                  const void *x, float *out) {                                    \
        enum { RUN = (has) & MOE__BOOKS ? 8 : 1 };                                                \
        const int size = MOE__BYTES_##NAME, per = MOE__PER_##NAME, bits = MOE__BITS_##NAME;       \
        const int mins = MOE__OFFSET_##NAME == 0, meta = MOE__META_##NAME;                        \
        const int bias = MOE__BIAS(NAME);                                                         \
        const int shifts = (has) & MOE__SHIFTS;                                                   \
        const __m256i less = u_set16((short)-bias);                                     \
        const uint8_t *rows_end = rows + (size_t)n_rows * row_size;                               \
        const moe__act256 *first = (const moe__act256 *)x, *end = first + n / 256;                \
        const moe__books *books = (has) & MOE__BOOKS ? moe__books_get() : NULL;                   \
        for (int64_t r = 0; r < n_rows; r++) {                                                    \
            const uint8_t *b = rows + (size_t)r * row_size;                                       \
            const float D = u_row_scale(b, meta);                                          \
            __m128 total = _mm_setzero_ps();                                                      \
            b += meta;                                                                            \
            for (const moe__act256 *a = first; a < end;) {                                        \
                MOE__(head) h[RUN];                                                               \
                const int count = RUN == 1 ? 1 : (int)moe__min(RUN, end - a);                     \
                for (int i = 0; i < count; i++) {                                                 \
                    fetch_ahead(b + size * i, rows_end, size);                                 \
                    MOE__(head_##name)(b + size * i, D, h + i);                                   \
                }                                                                                 \
                for (int i = 0; i < count; i++, a++, b += size) {                                 \
                    const __m256i scale = h[i].scale;                                             \
                    MOE__VI s[2] = {v_zero(), v_zero()};                            \
                    __m256i min = _mm256_setzero_si256();                                         \
                    h[i].books = books;                                                           \
                    if (shifts || bias) {                                                         \
                        const __m256i by = shifts ? _mm256_add_epi16(h[i].shift, less) : less;    \
                        s[0] = v_extend(                                                   \
                            u_times_sums(_mm256_mullo_epi16(scale, by), a, per));          \
                    }                                                                             \
                    MOE__UNROLL(8)                                                                \
                    for (int v = 0; v < MOE__LEVELS; v++)                                         \
                        s[v % 2] = v_multiply(s[v % 2], MOE__(level_##name)(b, v, h + i),  \
                                                     v_acts(a->q, order, v), scale, bits,  \
                                                     per, order, v);                              \
                    if (mins) min = u_times_sums(h[i].min, a, per);                        \
                    total = u_add_block(total, MOE__MM(add_epi32)(s[0], s[1]), min,        \
                                               h[i].d, a->d, mins, per);                          \
                }                                                                                 \
            }                                                                                     \
            out[r] = _mm_cvtss_f32(total);                                                        \
        }                                                                                         \
    }                                                                                             \
    MOE__K void MOE__(unpack_##name)(const uint8_t *b, int n, float D, moe__block *out) {         \
        const int per = MOE__PER_##NAME, mins = MOE__OFFSET_##NAME == 0;                          \
        const int shifts = (has) & MOE__SHIFTS;                                                   \
        MOE__(head) h;                                                                            \
        h.books = (has) & MOE__BOOKS ? moe__books_get() : NULL;                \
        (void)n;                                                                                  \
        MOE__(head_##name)(b, D, &h);                                                             \
        MOE__UNROLL(8)                                                                            \
        for (int v = 0; v < MOE__LEVELS; v++) {                                                   \
            MOE__VI levels = MOE__(level_##name)(b, v, &h);                                       \
            if (shifts) {                                                                         \
                const __m256i both = _mm256_or_si256(_mm256_slli_epi16(h.shift, 8),               \
                                                     _mm256_and_si256(h.shift,                    \
                                                                      u_set16(255)));   \
                levels = MOE__MM(add_epi8)(levels, v_spread(both, per, order, v));         \
            }                                                                                     \
            v_store(out->q + MOE__VBYTES * v, levels);                                  \
        }                                                                                         \
        u_store(out->scale, u_per_16(h.scale, per));                                \
        if (mins) u_store(out->min, u_per_16(h.min, per));                          \
        out->d[0] = _mm_cvtss_f32(h.d);                                                           \
        out->dmin[0] = mins ? _mm_cvtss_f32(_mm_movehdup_ps(h.d)) : 0;                            \
    }
#endif // MOE__ISA != 4

// ---- interleaved rows ------------------------------------------------------------------------

// Four (eight) rows lie side by side in dwords of four weights: a load gives the same weights of
// all of them, and their activations are copied to each. So a vector of sums has a row per
// dword, in every lane (in every two lanes), and needs no summing across until the end of a
// block. See >>types for where the fours of a sub-block of 32 weights lie; `level` of these
// types is vector v (0..3, with 512 bits 0..1) of sub-block j.

#if MOE__ISA != 4 // AVX-VNNI has these from AVX2

#define MOE__SUB_LEVELS (128 / MOE__VBYTES) // vectors of a sub-block of four rows

typedef struct rows_head {
    int8_t scale[64], min[64]; // [16 or 8 of a block][4 rows]
    int8_t shift[64];          // likewise: to be added to the levels
    __m128 d, dmin;
} rows_head;

// Lane l of vector v holds four t = r4_t of half r4_half.
MOE__V int r4_half(const int lane) { return lane % 2; }
MOE__V int r4_t(const int v, const int lane) { return MOE__LANES / 2 * v + lane / 2; }

// Dwords a, b, c, d (with 256 bits a and b) of 32 bytes in all dwords of their lanes
MOE__V MOE__VI v_dwords(__m256i x, const int a, const int b, const int c, const int d) {
#if MOE__ISA == 3
    const __m512i at = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
    return _mm512_permutexvar_epi32(at, _mm512_castsi256_si512(x));
#else
    (void)c, (void)d;
    return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(a, a, a, a, b, b, b, b));
#endif
}
// The fours of vector v of 32 activations
MOE__V MOE__VI v_acts_r4(__m256i acts, const int v) {
#define MOE__DWORD(lane) 4 * r4_half(lane) + r4_t(v, lane)
    return v_dwords(acts, MOE__DWORD(0), MOE__DWORD(1), MOE__DWORD(2), MOE__DWORD(3));
#undef MOE__DWORD
}

// ---- words: levels of four and eight rows

// Vector v of sub-block j
#define MOE__RW(name, ...) MOE__READER(MOE__VI, rw_##name, __VA_ARGS__, const int j, const int v)
MOE__RW(nibbles, int p) {
    const uint8_t *at = b + p + 64 * j;
#if MOE__ISA == 3
    return v_mask(_mm512_srli_epi16(v_load(at), 4 * v), 15);
#else
    return v_mask(_mm256_srli_epi16(v_load(at + 32 * (v % 2)), 4 * (v / 2)), 15);
#endif
}
// Bits from a h + b (t % 2) + c (t / 2) on, moved to bit `to`; others are not cleared. 32 bytes:
// half h is lane h; 16 bytes: both halves are in each
MOE__V MOE__VI v_bits_r4(MOE__VI x, const int v, const int a, const int b, const int c,
                         const int to) {
#define MOE__SHIFT(lane)                                                                     \
    (a * r4_half(lane) + b * (r4_t(v, lane) % 2) + c * (r4_t(v, lane) / 2))
#if MOE__ISA == 3
    const __m512i at =
        _mm512_setr_epi64(MOE__SHIFT(0), MOE__SHIFT(0), MOE__SHIFT(1), MOE__SHIFT(1),
                          MOE__SHIFT(2), MOE__SHIFT(2), MOE__SHIFT(3), MOE__SHIFT(3));
    return _mm512_rorv_epi64(x, _mm512_add_epi64(at, _mm512_set1_epi64(64 - to)));
#else
    const __m256i at =
        _mm256_setr_epi64x(MOE__SHIFT(0), MOE__SHIFT(0), MOE__SHIFT(1), MOE__SHIFT(1));
    return _mm256_slli_epi16(_mm256_srlv_epi64(x, at), to);
#endif
#undef MOE__SHIFT
}
MOE__V MOE__VI v_load_twice(const uint8_t *p) {
#if MOE__ISA == 3
    return _mm512_broadcast_i64x4(v_load_256(p));
#else
    return v_load(p);
#endif
}
MOE__RW(two, int p) { return v_mask(v_bits_r4(v_load_twice(b + p + 32 * j), v, 0, 2, 4, 0), 3); }
MOE__RW(three, int two, int one, int x, int y, int z) {
    const MOE__VI high = v_bits_r4(v_load16(b + one + 16 * j), v, x, y, z, 2);
    return v_join(MOE__(rw_two)(b, two, j, v), high, 1, 2);
}
MOE__RW(five, int four, int one, int x, int y, int z) {
    const MOE__VI high = v_bits_r4(v_load16(b + one + 16 * j), v, x, y, z, 4);
    return v_join(MOE__(rw_nibbles)(b, four, j, v), high, 1, 4);
}
MOE__RW(six, int four, int two, int y, int z) {
    const MOE__VI high = v_bits_r4(v_load_twice(b + two + 32 * j), v, 0, y, z, 4);
    return v_join(MOE__(rw_nibbles)(b, four, j, v), high, 2, 4);
}

// ---- words: scales of four rows

// They are written to the 64 (32) bytes `to`; d and dmin to h.
#define MOE__RS(name, ...) MOE__READER(void, rs_##name, __VA_ARGS__, int8_t *to)
#define MOE__RSET(name, ...) \
    MOE__READER(void, rd_##name, __VA_ARGS__, const float *D MOE__UNUSED, rows_head *h)
MOE__V __m128 u_four_halves(const uint8_t *p) {
    return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(const void *)p));
}
MOE__V __m256i u_mask8(__m256i x, const int mask) {
    return _mm256_and_si256(x, u_set8((char)mask));
}
MOE__V __m256i u_add8(__m256i x, const int y) {
    return _mm256_add_epi8(x, u_set8((char)y));
}
MOE__RS(int8, int p) { memcpy(to, b + p, 64); }
MOE__RS(low, int p) {
    u_store(to, u_mask8(v_load_256(b + p), 15));
    u_store(to + 32, u_mask8(v_load_256(b + p + 32), 15));
}
MOE__RS(high, int p) {
    u_store(to, u_mask8(_mm256_srli_epi16(v_load_256(b + p), 4), 15));
    u_store(to + 32, u_mask8(_mm256_srli_epi16(v_load_256(b + p + 32), 4), 15));
}
MOE__RS(four, int p) {
    const __m256i x = v_load_256(b + p);
    u_store(to, u_add8(u_mask8(x, 15), -8));
    u_store(to + 32, u_add8(u_mask8(_mm256_srli_epi16(x, 4), 15), -8));
}
MOE__RS(six, int p, int two) {
    const __m256i x = v_load_256(b + p);
    const __m256i bits = _mm256_broadcastsi128_si256(v_load_128(b + two));
    __m256i low = _mm256_srlv_epi64(bits, _mm256_setr_epi64x(0, 0, 2, 2)), high;
    high = u_mask8(_mm256_srli_epi16(low, 4), 3);
    low = _mm256_slli_epi16(u_mask8(low, 3), 4);
    high = _mm256_slli_epi16(high, 4);
    low = _mm256_or_si256(low, u_mask8(x, 15));
    high = _mm256_or_si256(high, u_mask8(_mm256_srli_epi16(x, 4), 15));
    u_store(to, u_add8(low, -32));
    u_store(to + 32, u_add8(high, -32));
}
MOE__RS(six_k, int p, int two, int mins) {
    const __m256i bytes = v_load_256(b + p), six = u_set8(48);
    __m256i high = _mm256_broadcastsi128_si256(v_load_128(b + two));
    high = _mm256_srlv_epi64(high, _mm256_setr_epi64x(0, 0, 4, 4));
    high = mins ? _mm256_slli_epi16(high, 2) : _mm256_slli_epi16(high, 4);
    u_store(to, u_or_and(u_mask8(mins ? _mm256_srli_epi16(bytes, 4) : bytes, 15), high, six));
}
// Bit i / 8 of byte i % 8 of x, for i = 0..31 (high: 32..63): -1 or 0
MOE__V __m256i u_bits_r4(uint64_t x, const int high) {
    const __m256i bit = _mm256_setr_epi64x(0x0101010101010101, 0x0202020202020202,
                                           0x0404040404040404, 0x0808080808080808);
    const __m256i bits = _mm256_set1_epi64x((int64_t)x);
    const __m256i at = high ? _mm256_slli_epi16(bit, 4) : bit;
    return _mm256_cmpeq_epi8(_mm256_and_si256(bits, at), at);
}
MOE__RS(bits, int p, int by) {
    const uint64_t bits = moe__load_u64(b + p);
    u_store(to, u_mask8(u_bits_r4(bits, 0), by));
    u_store(to + 32, u_mask8(u_bits_r4(bits, 1), by));
}
// 2 x + 1, negative where the sign is set
MOE__V __m256i u_odd_signed(__m256i x, __m256i sign) {
    x = u_add8(_mm256_add_epi8(x, x), 1);
    return _mm256_sub_epi8(_mm256_xor_si256(x, sign), sign);
}
MOE__RS(odd_signed, int p, int signs) {
    const __m256i x = v_load_256(b + p);
    const uint64_t bits = moe__load_u64(b + signs);
    u_store(to, u_odd_signed(u_mask8(x, 15), u_bits_r4(bits, 0)));
    u_store(to + 32, u_odd_signed(u_mask8(_mm256_srli_epi16(x, 4), 15), u_bits_r4(bits, 1)));
}
MOE__RS(even, int p) {
    const __m256i x = v_load_256(b + p);
    u_store(to, u_add8(_mm256_sub_epi8(x, u_mask8(x, 1)), -127));
}
MOE__RS(lowest, int p, int by) {
    const __m256i bit = u_mask8(v_load_256(b + p), 1);
    u_store(to, u_mask8(_mm256_sub_epi8(_mm256_setzero_si256(), bit), by));
}

MOE__RSET(half, int p) { h->d = u_four_halves(b + p); }
MOE__RSET(halves, int p) { h->d = u_four_halves(b + p), h->dmin = u_four_halves(b + p + 8); }
MOE__RSET(row, int p) { (void)p, h->d = _mm_loadu_ps(D); }

// ---- products with four rows

// The scales of sub-block j, per row and half: int16 twice in a dword, or int32
MOE__V MOE__VI v_scales_r4(const int8_t *scale, int j, const int per, const int words) {
    const int h = per == 16 ? 0x04040404 : 0; // second half
    const int a = 0x00800080, b = 0x01800180, c = 0x02800280, d = 0x03800380;
    const __m128i even = words ? _mm_setr_epi32(a, b, c, d)
                               : _mm_setr_epi32(0x00808080, 0x01808080, 0x02808080, 0x03808080);
    const __m128i odd = _mm_add_epi8(even, _mm_set1_epi32(h)); // 0x84 is a zero like 0x80
#if MOE__ISA == 3
    const __m512i at =
        _mm512_broadcast_i64x4(_mm256_inserti128_si256(_mm256_castsi128_si256(even), odd, 1));
    const __m512i bytes = per == 16 ? _mm512_set1_epi64((int64_t)moe__load_u64(scale + 8 * j))
                                    : _mm512_set1_epi32((int)moe__load_u32(scale + 4 * j));
    const __m512i x = _mm512_shuffle_epi8(bytes, at);
    return words ? _mm512_srai_epi16(x, 8) : _mm512_srai_epi32(x, 24);
#else
    const __m256i at = _mm256_inserti128_si256(_mm256_castsi128_si256(even), odd, 1);
    const __m256i bytes = per == 16 ? _mm256_set1_epi64x((int64_t)moe__load_u64(scale + 8 * j))
                                    : _mm256_set1_epi32((int)moe__load_u32(scale + 4 * j));
    return _mm256_srai_epi16(_mm256_shuffle_epi8(bytes, at), 8);
#endif
}

// Bytes [16 or 8][4 rows] as pairs of int16 of each row: pairs number MOE__LANES * i ..
MOE__V MOE__VI v_pairs_r4(const int8_t *bytes, const int i) {
    const __m128i at = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
#if MOE__ISA == 3
    const __m256i x = v_load_256(bytes + 32 * i);
    return _mm512_cvtepi8_epi16(_mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(at)));
#else
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(v_load_128(bytes + 16 * i), at));
#endif
}
// acc + per row the sum of x * (shift + add) * (sum of activations); shift NULL: 0
MOE__V MOE__VI v_times_sums_r4(MOE__VI acc, const int8_t *x, const int8_t *shift, const int add,
                               const moe__act256 *a, const int per) {
    const __m256i sums =
        per == 16 ? v_load_256(a->sum16) : _mm256_castsi128_si256(v_load_128(a->sum32));
    const MOE__VI more = v_set16((short)add);
    MOE__UNROLL(4)
    for (int i = 0; i < 128 / per / MOE__LANES; i++) {
        const int at = MOE__LANES * i;
        MOE__VI y = v_pairs_r4(x, i);
        if (shift)
            y = MOE__MM(mullo_epi16)(y, MOE__MM(add_epi16)(v_pairs_r4(shift, i), more));
        else if (add != 1)
            y = MOE__MM(mullo_epi16)(y, more);
        acc = v_dot_i16(acc, y, v_dwords(sums, at, at + 1, at + 2, at + 3));
    }
    return acc;
}

// acc + the products of sub-block j, whose levels are w, times its scales
MOE__V MOE__VI v_multiply_r4(MOE__VI acc, const MOE__VI *w, const int8_t *q, const int8_t *scale,
                             int j, const int bits, const int per) {
    const __m256i acts = v_load_256(q + moe__act256_at(32 * j));
#if MOE__ISA == 3
    if (bits == 8) {
        __m512i sum = _mm512_setzero_si512();
        MOE__UNROLL(4)
        for (int v = 0; v < MOE__SUB_LEVELS; v++) sum = v_quads(sum, w[v], v_acts_r4(acts, v), 8);
        return _mm512_add_epi32(acc, _mm512_mullo_epi32(sum, v_scales_r4(scale, j, per, 0)));
    }
#endif
    const MOE__VI scales = v_scales_r4(scale, j, per, 1);
    MOE__UNROLL(4)
    for (int v = 0; v < MOE__SUB_LEVELS; v++)
        acc = v_dot_i16(acc, v_twos(w[v], v_acts_r4(acts, v), bits), scales);
    return acc;
}

// What tiles want of half a panel: its rows' levels and scales, see "the scratch of tiles".
typedef struct rows_out {
    uint8_t *pack;
    int64_t half;
    int per; // weights per scale, 16 or 32: as many as the type has, or less
    int add; // to the levels
} rows_out;
MOE__V void rows_put(const rows_out *out, int quad, MOE__VI x) {
    tile_put(out->pack, quad, out->half, MOE__MM(add_epi8)(x, v_set8((char)out->add)));
}
// Vectors v of sub-block j of as many groups of four rows as fill a vector with rows
MOE__V void MOE__(rows_put_r4)(const rows_out *out, int j, const int v, const MOE__VI *x) {
#define MOE__AT(lane) 8 * j + 4 * r4_half(lane) + r4_t(v, lane)
#if MOE__ISA == 3
    __m512i y[4];
    v_turn_lanes(x, y);
    rows_put(out, MOE__AT(0), y[0]), rows_put(out, MOE__AT(1), y[1]);
    rows_put(out, MOE__AT(2), y[2]), rows_put(out, MOE__AT(3), y[3]);
#else
    rows_put(out, MOE__AT(0), _mm256_permute2x128_si256(x[0], x[1], 0x20));
    rows_put(out, MOE__AT(1), _mm256_permute2x128_si256(x[0], x[1], 0x31));
#endif
#undef MOE__AT
}
// Shifts of sub-block j, per row and half, in every byte
MOE__V MOE__VI v_shift_r4(const int8_t *shift, int j, const int per) {
    const __m128i even = _mm_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303);
    const __m128i odd = _mm_add_epi8(even, _mm_set1_epi8(per == 16 ? 4 : 0));
    const __m256i at = _mm256_inserti128_si256(_mm256_castsi128_si256(even), odd, 1);
    const __m256i bytes = per == 16 ? _mm256_set1_epi64x((int64_t)moe__load_u64(shift + 8 * j))
                                    : _mm256_set1_epi32((int)moe__load_u32(shift + 4 * j));
    const __m256i x = _mm256_shuffle_epi8(bytes, at);
#if MOE__ISA == 3
    return _mm512_broadcast_i64x4(x);
#else
    return x;
#endif
}
typedef void MOE__(rows_fn)(const uint8_t *const *group, int n, const float (*D)[4],
                            const rows_out *out);
// The scales, mins and their scales of those groups; `per` of the type
MOE__V void MOE__(rows_put_heads)(const rows_out *out, const rows_head *h, const int per,
                                  const int mins) {
    enum { GROUPS = MOE__VFLOATS / 4 };
    uint8_t *half = out->pack + out->half * MOE__VBYTES;
    for (int s = 0; s < 256 / out->per; s++) {
        int32_t bytes[GROUPS];
        for (int g = 0; g < GROUPS; g++)
            memcpy(bytes + g, h[g].scale + 4 * (s * out->per / per), 4);
#if MOE__ISA == 3
        const __m512i x = _mm512_cvtepi8_epi32(v_load_128(bytes));
#else
        const __m256i x = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(void *)bytes));
#endif
        tile_put_int(out->pack, s, out->half, x);
    }
    for (int i = 0; mins && i < 128 / per; i++) {
        int8_t bytes[8 * GROUPS];
        for (int g = 0; g < GROUPS; g++) memcpy(bytes + 8 * g, h[g].min + 8 * i, 8);
        v_store(half + TILE_MIN + 2 * i * MOE__VBYTES, v_pairs_r4(bytes, 0));
    }
    for (int g = 0; g < GROUPS; g++) {
        _mm_storeu_ps((float *)(void *)(half + TILE_D) + 4 * g, h[g].d);
        if (mins)
            _mm_storeu_ps((float *)(void *)(half + TILE_DMIN) + 4 * g,
                          _mm_sub_ps(_mm_setzero_ps(), h[g].dmin));
    }
}

// A type of four rows: its dot products, and its rows for tiles: of groups group[0], ...
#define MOE__TYPE_R4(NAME, name, shifts)                                                          \
    MOE__K void MOE__(dot_##name)(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n, \
                                  const void *x, float *out) {                                    \
        const int size = 4 * MOE__BYTES_##NAME, per = MOE__PER_##NAME, bits = MOE__BITS_##NAME;   \
        const int mins = MOE__OFFSET_##NAME == 0, meta = 4 * MOE__META_##NAME;                    \
        const int bias = MOE__BIAS(NAME);                                                         \
        const uint8_t *rows_end = rows + (size_t)n_rows * row_size;                               \
        const moe__act256 *first = (const moe__act256 *)x, *end = first + n / 256;                \
        for (int64_t r = 0; r < n_rows; r += 4) {                                                 \
            const uint8_t *b = rows + (size_t)r * row_size;                                       \
            float D[4];                                                                           \
            __m128 total = _mm_setzero_ps();                                                      \
            if (meta) memcpy(D, b, sizeof D);                                                     \
            b += meta;                                                                            \
            for (const moe__act256 *a = first; a < end; a++, b += size) {                         \
                rows_head h;                                                               \
                MOE__VI sum = v_zero();                                                    \
                fetch_ahead(b, rows_end, size);                                                \
                MOE__(head_##name)(b, D, &h);                                                     \
                if (shifts || bias)                                                               \
                    sum = v_times_sums_r4(sum, h.scale, shifts ? h.shift : NULL, -bias, a, \
                                                 per);                                            \
                for (int j = 0; j < 8; j++) {                                                     \
                    MOE__VI w[MOE__SUB_LEVELS];                                                   \
                    MOE__UNROLL(4)                                                                \
                    for (int v = 0; v < MOE__SUB_LEVELS; v++)                                     \
                        w[v] = MOE__(level_##name)(b, j, v);                                      \
                    sum = v_multiply_r4(sum, w, a->q, h.scale, j, bits, per);              \
                }                                                                                 \
                __m128 part = _mm_mul_ps(_mm_cvtepi32_ps(u_rows_4(sum)), h.d);             \
                if (mins) {                                                                       \
                    sum = v_times_sums_r4(v_zero(), h.min, NULL, 1, a, per);        \
                    part = _mm_fnmadd_ps(_mm_cvtepi32_ps(u_rows_4(sum)), h.dmin, part);    \
                }                                                                                 \
                total = _mm_fmadd_ps(part, _mm_set1_ps(a->d), total);                             \
            }                                                                                     \
            _mm_storeu_ps(out + r, total);                                                        \
        }                                                                                         \
    }                                                                                             \
    MOE__K void MOE__(rows_##name)(const uint8_t *const *group, int n, const float (*D)[4],       \
                                   const rows_out *out) {                                  \
        enum { GROUPS = MOE__VFLOATS / 4 };                                                       \
        const int per = MOE__PER_##NAME, mins = MOE__OFFSET_##NAME == 0;                          \
        rows_head h[GROUPS];                                                               \
        (void)n;                                                                                  \
        for (int g = 0; g < GROUPS; g++) MOE__(head_##name)(group[g], D[g], h + g);               \
        for (int j = 0; j < 8; j++) {                                                             \
            MOE__UNROLL(4)                                                                        \
            for (int v = 0; v < MOE__SUB_LEVELS; v++) {                                           \
                MOE__VI w[GROUPS];                                                                \
                MOE__UNROLL(4)                                                                    \
                for (int g = 0; g < GROUPS; g++) {                                                \
                    w[g] = MOE__(level_##name)(group[g], j, v);                                   \
                    if (shifts)                                                                   \
                        w[g] = MOE__MM(add_epi8)(w[g], v_shift_r4(h[g].shift, j, per));    \
                }                                                                                 \
                MOE__(rows_put_r4)(out, j, v, w);                                                 \
            }                                                                                     \
        }                                                                                         \
        MOE__(rows_put_heads)(out, h, per, mins);                                                 \
    }

// ---- eight rows

// Units of 32 bytes hold a four of each of eight rows; a vector has one or two of them, from
// number MOE__UNITS * v.
#define MOE__UNITS (MOE__VBYTES / 32)

// Fours a (and b) of 32 activations
MOE__V MOE__VI v_acts_r8(__m256i acts, const int a, const int b) {
#if MOE__ISA == 3
    return v_dwords(acts, a, a, b, b);
#else
    return (void)b, v_dwords(acts, a, a, a, a);
#endif
}
// Puts the units of as many groups of eight rows as fill a vector with rows: fours a (and b).
MOE__V void MOE__(rows_put_r8)(const rows_out *out, int j, const MOE__VI *x, const int a,
                               const int b) {
#if MOE__ISA == 3
    rows_put(out, 8 * j + a, _mm512_shuffle_i64x2(x[0], x[1], 0x44));
    rows_put(out, 8 * j + b, _mm512_shuffle_i64x2(x[0], x[1], 0xEE));
#else
    (void)b;
    rows_put(out, 8 * j + a, x[0]);
#endif
}

// IQ4_XS_R8: in a unit the low nibbles are the even fours, the high ones the odd ones. Scales
// of sub-block j are bytes 8 j .. of rs_six's.
MOE__V MOE__VI level_iq4_xs_r8(const uint8_t *b, int j, const int v, const int high) {
    const MOE__VI x = v_load(b + 64 + 128 * j + MOE__VBYTES * v);
    return v_lookup(moe__levels_k4, v_mask(MOE__MM(srli_epi16)(x, high ? 4 : 0), 15), 16,
                    MOE__BIAS8);
}
MOE__K void MOE__(dot_iq4_xs_r8)(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n,
                                 const void *x, float *out) {
    enum { size = 8 * MOE__BYTES_IQ4_XS_R8, P = MOE__UNITS };
    const uint8_t *rows_end = rows + (size_t)n_rows * row_size;
    const moe__act256 *first = (const moe__act256 *)x, *end = first + n / 256;
    for (int64_t r = 0; r < n_rows; r += 8) {
        const uint8_t *b = rows + (size_t)r * row_size;
        __m256 total = _mm256_setzero_ps();
        for (const moe__act256 *a = first; a < end; a++, b += size) {
            rows_head h;
            __m256i sum = _mm256_setzero_si256();
            fetch_ahead(b, rows_end, size);
            MOE__(rs_six)(b, 32, 16, h.scale);
            for (int j = 0; j < 8; j++) {
                const __m256i acts = v_load_256(a->q + moe__act256_at(32 * j));
                MOE__VI s = v_zero();
                MOE__UNROLL(4)
                for (int v = 0; v < 4 / P; v++) {
                    s = v_quads(s, level_iq4_xs_r8(b, j, v, 0),
                                v_acts_r8(acts, 2 * P * v, 2 * P * v + 2), 8);
                    s = v_quads(s, level_iq4_xs_r8(b, j, v, 1),
                                v_acts_r8(acts, 2 * P * v + 1, 2 * P * v + 3), 8);
                }
                const __m256i less = _mm256_set1_epi32(MOE__BIAS8 * a->sum32[j]);
                const __m256i scale = _mm256_cvtepi8_epi32(
                    _mm_loadl_epi64((const __m128i *)(const void *)(h.scale + 8 * j)));
                sum = _mm256_add_epi32(
                    sum, _mm256_mullo_epi32(_mm256_sub_epi32(u_rows_8(s), less), scale));
            }
            const __m256 part =
                _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_cvtph_ps(v_load_128(b)));
            total = _mm256_fmadd_ps(part, _mm256_set1_ps(a->d), total);
        }
        _mm256_storeu_ps(out + r, total);
    }
}
MOE__K void MOE__(rows_iq4_xs_r8)(const uint8_t *const *group, int n, const float (*D)[4],
                                  const rows_out *out) {
    enum { GROUPS = MOE__VFLOATS / 8, P = MOE__UNITS };
    rows_head h[GROUPS];
    uint8_t *half = out->pack + out->half * MOE__VBYTES;
    (void)n, (void)D;
    for (int g = 0; g < GROUPS; g++) {
        MOE__(rs_six)(group[g], 32, 16, h[g].scale);
        _mm256_storeu_ps((float *)(void *)(half + TILE_D) + 8 * g,
                         _mm256_cvtph_ps(v_load_128(group[g])));
    }
    for (int j = 0; j < 8; j++) {
        MOE__UNROLL(8)
        for (int i = 0; i < 8 / P; i++) { // vector i / 2, low or high nibbles
            MOE__VI w[GROUPS];
            for (int g = 0; g < GROUPS; g++) w[g] = level_iq4_xs_r8(group[g], j, i / 2, i % 2);
            MOE__(rows_put_r8)(out, j, w, 2 * P * (i / 2) + i % 2, 2 * P * (i / 2) + i % 2 + 2);
        }
    }
    for (int s = 0; s < 256 / out->per; s++)
        for (int g = 0; g < GROUPS; g++) {
            const __m256i x = _mm256_cvtepi8_epi32(_mm_loadl_epi64(
                (const __m128i *)(const void *)(h[g].scale + 8 * (s * out->per / 32))));
            u_store(half + TILE_SCALE + 2 * s * MOE__VBYTES + 32 * g, x);
        }
}

// ---- interleaved rows of 32-wide blocks

// Fours of one block of 32 weights: with four rows vectors as above, with eight rows units of
// fours 0..3 in the low nibbles, 4..7 in the high ones (Q8_0_R8: 0..7). `level` is vector v.
MOE__RW(nibbles_8, int p) {
    const int n = 4 / MOE__UNITS;
    const MOE__VI x = v_load(b + p + MOE__VBYTES * (v % n));
    return (void)j, v_mask(MOE__MM(srli_epi16)(x, v / n * 4), 15);
}
MOE__RW(int8_8, int p) {
    const MOE__VI bias = v_set8((char)MOE__BIAS8);
    return (void)j, MOE__MM(add_epi8)(v_load(b + p + MOE__VBYTES * v), bias);
}

// The scales of the rows of a block
MOE__V __m256 u_scales_rows(const uint8_t *b, const int rows, const int type) {
    if (type == MOE__INDEX_MXFP4_R8)
        return MOE__AVX2(v_e8m0)(
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)b)));
    if (rows == 4) return _mm256_zextps128_ps256(u_four_halves(b));
    return _mm256_cvtph_ps(v_load_128(b));
}

#define MOE__TYPE_ROWS_32(NAME, name)                                                             \
    MOE__K void MOE__(dot_##name)(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n, \
                                  const void *x, float *out) {                                    \
        const int R = MOE__ROWS_##NAME, size = R * MOE__BYTES_##NAME, bits = MOE__BITS_##NAME;    \
        const int bias = MOE__BIAS(NAME), P = MOE__UNITS;                                        \
        const uint8_t *rows_end = rows + (size_t)n_rows * row_size;                               \
        for (int64_t r = 0; r < n_rows; r += R) {                                                 \
            const uint8_t *b = rows + (size_t)r * row_size;                                       \
            const moe__act32 *a = (const moe__act32 *)x;                                          \
            __m256 total[4];                                                                      \
            for (int c = 0; c < 4; c++) total[c] = _mm256_setzero_ps();                           \
            for (int64_t at = 0; at < n; at += 256, a++, b += 8 * size) {                         \
                const int n_blocks = (int)moe__min(8, (n - at) / 32);                             \
                fetch_ahead(b, rows_end, 8 * size);                                            \
                for (int c = 0; c < 4; c++) {                                                     \
                    for (int j = c; j < n_blocks; j += 4) {                                       \
                        const uint8_t *block = b + size * j;                                      \
                        const __m256i acts = u_act32(a->q, j);                             \
                        MOE__VI s = v_zero();                                              \
                        MOE__UNROLL(8)                                                            \
                        for (int v = 0; v < 32 * R / MOE__VBYTES; v++)                            \
                            s = v_quads(s, MOE__(level_##name)(block, v),                  \
                                               R == 4 ? v_acts_r4(acts, v)                 \
                                                      : v_acts_r8(acts, P * v, P * v + 1), \
                                               bits);                                             \
                        const __m256i sum = R == 4 ? _mm256_zextsi128_si256(u_rows_4(s))   \
                                                   : u_rows_8(s);                          \
                        const __m256i more = _mm256_set1_epi32(bias * a->nsum[j]);                \
                        const __m256 d = u_scales_rows(block, R, MOE__INDEX_##NAME);       \
                        total[c] = _mm256_fmadd_ps(                                               \
                            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sum, more)), d),    \
                            _mm256_set1_ps(a->d[j]), total[c]);                                   \
                    }                                                                             \
                }                                                                                 \
            }                                                                                     \
            total[0] = _mm256_add_ps(_mm256_add_ps(total[0], total[2]),                           \
                                     _mm256_add_ps(total[1], total[3]));                          \
            if (R == 4) _mm_storeu_ps(out + r, _mm256_castps256_ps128(total[0]));                 \
            else _mm256_storeu_ps(out + r, total[0]);                                             \
        }                                                                                         \
    }                                                                                             \
    MOE__K void MOE__(rows_##name)(const uint8_t *const *group, int n, const float (*D)[4],       \
                                   const rows_out *out) {                                  \
        enum { R = MOE__ROWS_##NAME, size = R * MOE__BYTES_##NAME, GROUPS = MOE__VFLOATS / R,     \
               P = MOE__UNITS };                                                                 \
        (void)D;                                                                                  \
        for (int j = 0; j < n / 32; j++) {                                                        \
            float d[MOE__VFLOATS + 8];                                                            \
            MOE__UNROLL(8)                                                                        \
            for (int v = 0; v < 32 * R / MOE__VBYTES; v++) {                                      \
                MOE__VI w[GROUPS];                                                                \
                for (int g = 0; g < GROUPS; g++)                                                  \
                    w[g] = MOE__(level_##name)(group[g] + size * j, v);                           \
                if (R == 4) MOE__(rows_put_r4)(out, j, v, w);                                     \
                else MOE__(rows_put_r8)(out, j, w, P * v, P * v + 1);                             \
            }                                                                                     \
            for (int g = 0; g < GROUPS; g++)                                                      \
                _mm256_storeu_ps(d + R * g,                                                       \
                                 u_scales_rows(group[g] + size * j, R, MOE__INDEX_##NAME)); \
            tile_put_int(out->pack, j, out->half, v_load(d));                       \
        }                                                                                         \
    }
#endif // MOE__ISA != 4

// ---- dot products: blocks of 32 --------------------------------------------------------------

// A vector holds some bytes of MOE__LANES blocks of a row, one block per lane, and so do the
// activations (see moe__act32): weights 0-15 of each block, then 16-31. Products of levels and
// activations are summed in int32 to four numbers per lane, then across: one per block. They are
// floats from there on, multiplied with the scales of weights and activations, and added to four
// sums, see moe__dot_32.

#if MOE__ISA != 4 // AVX-VNNI has these from AVX2

// v_dot_i16 on 256 bits
MOE__V __m256i u_dot_i16(__m256i acc, __m256i a, __m256i b) {
#if MOE__ISA == 3
    return _mm256_dpwssd_epi32(acc, a, b);
#else
    return v_dot_i16(acc, a, b);
#endif
}
// The block of a lane of vector i of moe__act32: the even ones come first
MOE__V int q32_block(const int i, const int lane) {
    const int number = MOE__LANES * i + lane;
    return number % 4 * 2 + number / 4;
}
// Per lane: the sums of x's neighbouring dwords, then of y's
MOE__V MOE__VI v_hadd(MOE__VI x, MOE__VI y) {
#if MOE__ISA == 3
    const __m512 a = _mm512_castsi512_ps(x), b = _mm512_castsi512_ps(y);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD)));
#else
    return _mm256_hadd_epi32(x, y);
#endif
}
// 16 bytes at `p` of the blocks of vector i
MOE__V MOE__VI q32_load(const uint8_t *p, const int size, const int i) {
#define MOE__BLOCK(lane) v_load_128(p + size * q32_block(i, lane))
    __m256i low = _mm256_castsi128_si256(MOE__BLOCK(0));
    low = _mm256_inserti128_si256(low, MOE__BLOCK(1), 1);
#if MOE__ISA == 3
    __m256i high = _mm256_castsi128_si256(MOE__BLOCK(2));
    high = _mm256_inserti128_si256(high, MOE__BLOCK(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
    return low;
#endif
#undef MOE__BLOCK
}
// The same of 8 bytes, twice
MOE__V MOE__VI MOE__(q32_load_8)(const uint8_t *p, const int size, const int i) {
#define MOE__BLOCK(lane) (int64_t)moe__load_u64(p + size * q32_block(i, lane))
#if MOE__ISA == 3
    return _mm512_setr_epi64(MOE__BLOCK(0), MOE__BLOCK(0), MOE__BLOCK(1), MOE__BLOCK(1),
                             MOE__BLOCK(2), MOE__BLOCK(2), MOE__BLOCK(3), MOE__BLOCK(3));
#else
    return _mm256_setr_epi64x(MOE__BLOCK(0), MOE__BLOCK(0), MOE__BLOCK(1), MOE__BLOCK(1));
#endif
#undef MOE__BLOCK
}

#if MOE__ISA == 3
// 16-bit words at byte (size i + at) / 2 * 2 of 128 bytes, for i = first..first + n - 1
MOE__V __m512i MOE__(q32_words)(const uint8_t *b, const int size, const int at, const int first,
                                const int n) {
#define MOE__WORD(i) (i) < n ? (size * (first + (i)) + at) / 2 : 0
    const __m256i words = _mm256_setr_epi16(MOE__WORD(0), MOE__WORD(1), MOE__WORD(2), MOE__WORD(3),
                                            MOE__WORD(4), MOE__WORD(5), MOE__WORD(6), MOE__WORD(7),
                                            0, 0, 0, 0, 0, 0, 0, 0);
#undef MOE__WORD
    return _mm512_permutex2var_epi16(v_load(b), _mm512_castsi256_si512(words), v_load(b + 64));
}
// 16 bytes at b + at of the blocks of vector i, of eight blocks of at most 18 bytes:
// picked out of 128 bytes. With an odd size the window begins so that these bytes are whole
// words.
MOE__V __m512i MOE__(q32_pick)(const uint8_t *b, const int size, const int at, const int i) {
    const int from = i ? 8 * size - 128 : at % 2, first = size * i + at - from;
    const uint64_t each = 0x0001000100010001, step = 0x0003000200010000;
#define MOE__WORDS(lane, more) \
    (int64_t)(each * (uint64_t)(size * (lane) + first / 2 + (more)) + step)
    const __m512i words = _mm512_setr_epi64(MOE__WORDS(0, 0), MOE__WORDS(0, 4), MOE__WORDS(1, 0),
                                            MOE__WORDS(1, 4), MOE__WORDS(2, 0), MOE__WORDS(2, 4),
                                            MOE__WORDS(3, 0), MOE__WORDS(3, 4));
#undef MOE__WORDS
    return _mm512_permutex2var_epi16(v_load(b + from), words, v_load(b + from + 64));
}
#endif

// The numbers at b + at of eight blocks as floats: f16, or the exponents of MXFP4
MOE__V __m256 MOE__(q32_scales)(const uint8_t *b, const int at, const int type) {
    const int size = q32_size(type);
#if MOE__ISA == 3 // picked out of 128 bytes, or of 128 bytes for each half
    if (type == MOE__INDEX_MXFP4) { // an odd block's is the high byte of a word, for 17 i is odd
#define MOE__WORD(i) 17 * (i) / 2, 0
        const __m256i words = _mm256_setr_epi16(MOE__WORD(0), MOE__WORD(1), MOE__WORD(2),
                                                MOE__WORD(3), MOE__WORD(4), MOE__WORD(5),
                                                MOE__WORD(6), MOE__WORD(7));
#undef MOE__WORD
        const __m256i e = _mm512_castsi512_si256(
            _mm512_permutex2var_epi16(v_load(b), _mm512_castsi256_si512(words), v_load(b + 64)));
        return MOE__AVX2(v_e8m0)(_mm256_maddubs_epi16(e, _mm256_set1_epi64x(0x0000010000000001)));
    }
    const int behind = (int)moe__min(4 * size, 8 * size - 128), fit = (126 - at) / size + 1;
    __m128i x = _mm512_castsi512_si128(MOE__(q32_words)(b, size, at, 0, fit));
    if (fit < 8) {
        const __m128i y = _mm512_castsi512_si128(
            MOE__(q32_words)(b + behind, size, at - behind, 4, 4));
        x = _mm_unpacklo_epi64(x, y);
    }
    return _mm256_cvtph_ps(x);
#else
    uint64_t low = 0, high = 0; // put together outside the vector units, which are busy
    b += at;
    if (type == MOE__INDEX_MXFP4) {
        MOE__UNROLL(8)
        for (int i = 0; i < 8; i++) low |= (uint64_t)b[size * i] << 8 * i;
        return v_e8m0(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)low)));
    }
    MOE__UNROLL(4)
    for (int i = 0; i < 4; i++) {
        low |= (uint64_t)moe__load_u16(b + size * i) << 16 * i;
        high |= (uint64_t)moe__load_u16(b + size * (i + 4)) << 16 * i;
    }
    return _mm256_cvtph_ps(_mm_set_epi64x((int64_t)high, (int64_t)low));
#endif
}

#if MOE__ISA == 3
// The fifth bits of eight blocks of Q5_0 or Q5_1, `at` bytes into each: a bit per weight, of
// weights 0-15 of blocks 0 2 4 6, 16-31 of these, and the same of blocks 1 3 5 7
typedef struct q32_fifths {
    uint64_t mask[4];
} q32_fifths;
MOE__V q32_fifths MOE__(q32_all_fifths)(const uint8_t *b, const int size, const int at) {
    const int behind = 8 * size - 128; // blocks 0-3 are in the first 128 bytes, 4-7 in the last
#define MOE__WORD(i, half) (size * (i) + at - ((i) < 4 ? 0 : behind)) / 2 + half
#define MOE__WORDS(i)                                                                           \
    _mm512_castsi256_si512(_mm256_setr_epi16(                                                   \
        MOE__WORD(i, 0), MOE__WORD(i + 2, 0), MOE__WORD(i, 0), MOE__WORD(i + 2, 0),             \
        MOE__WORD(i, 1), MOE__WORD(i + 2, 1), MOE__WORD(i, 1), MOE__WORD(i + 2, 1),             \
        MOE__WORD(i + 1, 0), MOE__WORD(i + 3, 0), MOE__WORD(i + 1, 0), MOE__WORD(i + 3, 0),     \
        MOE__WORD(i + 1, 1), MOE__WORD(i + 3, 1), MOE__WORD(i + 1, 1), MOE__WORD(i + 3, 1)))
    const __m256i low =
        _mm512_castsi512_si256(_mm512_permutex2var_epi16(v_load(b), MOE__WORDS(0), v_load(b + 64)));
    const __m256i high = _mm512_castsi512_si256(
        _mm512_permutex2var_epi16(v_load(b + behind), MOE__WORDS(4), v_load(b + behind + 64)));
#undef MOE__WORDS
#undef MOE__WORD
    q32_fifths f;
    u_store(f.mask, _mm256_blend_epi32(low, high, 0xAA));
    __asm__("" : "+m"(f)); // loads of masks are cheaper than moves from vectors
    return f;
}
#endif

// Levels of weights 0-15 (low) and 16-31 (high) of the blocks of vector i, plus the type's
// offset; in AVX2 Q8_0 and IQ4_NL keep their signs.
typedef struct q32_levels {
    MOE__VI low, high;
} q32_levels;
MOE__V q32_levels MOE__(q32_unpack)(const uint8_t *b, const int i, MOE__VI table, const int type) {
    const int size = q32_size(type), low_at = MOE__(q32_low)(type);
    q32_levels w;
#if MOE__ISA == 3
    if (size <= 18)
        w.low = MOE__(q32_pick)(b, size, low_at, i);
    else
#endif
        w.low = q32_load(b + low_at, size, i);
    if (type == MOE__INDEX_Q8_0) {
#if MOE__ISA == 3 // two whole blocks in a vector; their halves are exchanged
#define MOE__BLOCK(lane) v_load_256(b + low_at + size * q32_block(i, lane))
#define MOE__BLOCKS(lane)                                                            \
    _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(MOE__BLOCK(lane)),    \
                                        MOE__BLOCK((lane) + 1), 1), _mm512_set1_epi8(-128))
        const __m512i x = MOE__BLOCKS(0), y = MOE__BLOCKS(2);
#undef MOE__BLOCKS
#undef MOE__BLOCK
        w.low = _mm512_shuffle_i64x2(x, y, 0x88), w.high = _mm512_shuffle_i64x2(x, y, 0xDD);
#else
        w.high = q32_load(b + low_at + 16, size, i);
#endif
        return w;
    }
    w.high = v_mask(MOE__MM(srli_epi16)(w.low, 4), 15);
    w.low = v_mask(w.low, 15);
    if (type == MOE__INDEX_MXFP4 || type == MOE__INDEX_IQ4_NL) {
        w.low = MOE__MM(shuffle_epi8)(table, w.low);
        w.high = MOE__MM(shuffle_epi8)(table, w.high);
    }
    if (type == MOE__INDEX_Q5_0 || type == MOE__INDEX_Q5_1) {
#if MOE__ISA == 3
        const q32_fifths f = MOE__(q32_all_fifths)(b, size, low_at - 4);
        const __m512i more = _mm512_set1_epi8(16);
        w.low = _mm512_mask_add_epi8(w.low, f.mask[2 * i], w.low, more);
        w.high = _mm512_mask_add_epi8(w.high, f.mask[2 * i + 1], w.high, more);
#else
        // bits of weights 0-15 in bytes 0 and 1, of the others behind
        const __m256i byte = v_lanes(_mm_set_epi64x(0x0101010101010101, 0));
        const __m256i bit = v_lanes(_mm_set1_epi64x((int64_t)0x8040201008040201));
        const __m256i fifth = q32_load(b + low_at - 4, size, i);
        const __m256i rest = _mm256_srli_epi32(fifth, 16);
        w.low = v_add_where(w.low, _mm256_shuffle_epi8(fifth, byte), bit, 16);
        w.high = v_add_where(w.high, _mm256_shuffle_epi8(rest, byte), bit, 16);
#endif
    }
    if (type == MOE__INDEX_Q6_0) { // 8 bytes: pairs of bits of weights 0-7, 16-23, 8-15, 24-31
        const MOE__VI bits =
            MOE__MM(srlv_epi64)(MOE__(q32_load_8)(b + 2, size, i), v_lanes(_mm_set_epi64x(4, 0)));
        w.low = v_join(w.low, MOE__MM(slli_epi16)(bits, 4), 2, 4);
        w.high = v_join(w.high, MOE__MM(slli_epi16)(bits, 2), 2, 4);
    }
    return w;
}

// The int32 sums of eight blocks times a record of activations, from the sums of their fours:
// four per lane, a lane per block
MOE__V __m256i MOE__(q32_sum)(const MOE__VI *s) {
#if MOE__ISA == 3
    __m512i x = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]),
                                 _mm512_unpackhi_epi32(s[0], s[1]));
    x = _mm512_add_epi32(x, _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0x4E));
    const __m512i at = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi32(at, x));
#else
    // blocks 0 4 1 5 | 2 6 3 7
    const __m256i x = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]),
                                        _mm256_hadd_epi32(s[2], s[3]));
    return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
#endif
}

// Of eight blocks and a record of activations: scale * int(sum of q a)
MOE__V __m256 MOE__(q32_products)(const uint8_t *b, const moe__act32 *a, MOE__VI table,
                                  const int type) {
    enum { GROUPS = 8 / MOE__LANES };
    const int is_signed = MOE__ISA == 2 && (type == MOE__INDEX_Q8_0 || type == MOE__INDEX_IQ4_NL);
    const __m256i nsum = v_load_256(a->nsum);
    MOE__VI s[GROUPS];
    MOE__UNROLL(4)
    for (int i = 0; i < GROUPS; i++) {
        const int8_t *q = a->q + moe__act32_at(32 * q32_block(i, 0));
        const MOE__VI a_low = v_load(q), a_high = v_load(q + 64);
        const q32_levels w = MOE__(q32_unpack)(b, i, table, type);
#if MOE__ISA == 2
        if (!is_signed) { // two sums of two fit in int16: 4 * 63 * 127 = 32004
            s[i] = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, a_low),
                                    _mm256_maddubs_epi16(w.high, a_high));
            s[i] = _mm256_madd_epi16(s[i], u_set16(1));
            continue;
        }
#endif
        s[i] = v_quads(v_zero(), w.low, a_low, 8);
        s[i] = v_quads(s[i], w.high, a_high, 8);
    }
    __m256i sum = MOE__(q32_sum)(s);
    const int has_min = MOE__(q32_min)(type);
    if (!is_signed && !has_min) // |nsum| <= 32 * 127: the low halves are all of it
        sum = u_dot_i16(sum, nsum, _mm256_set1_epi32(1 << q32_shift(type)));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), MOE__(q32_scales)(b, 0, type));
}

// Eight E4M3 scales as moe__types_ue4m3: as bits of an f16 they are numbers 2^8 too small
MOE__V __m256 u_ue4m3(__m128i x) {
    const __m128i none = _mm_cmpeq_epi16(x, _mm_set1_epi16(0x7F));
    const __m128i bits = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x7F)), 7);
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_andnot_si128(none, bits)), _mm256_set1_ps(128.0f));
}

// The same of NVFP4, which has 16 scales: 8 floats, and 8 behind. 16 bytes are two groups of 16
// weights, 8 bytes and 8 bytes: weights 0-7 of both in the low nibbles, 8-15 in the high ones,
// so that their sums are in the halves of a lane.
typedef struct MOE__(two) {
    __m256 first, second;
} MOE__(two);
MOE__V MOE__(two) MOE__(nvfp4_products)(const uint8_t *b, const moe__act32 *a, MOE__VI table) {
    enum { GROUPS = 8 / MOE__LANES, BYTES = MOE__BYTES_NVFP4 };
    MOE__VI s[GROUPS];
    MOE__ALIGNED(64) int32_t sums[16];
    MOE__(two) out;
    MOE__UNROLL(4)
    for (int i = 0; i < GROUPS; i++) {
        const int8_t *q = a->q + moe__act32_at(32 * q32_block(i, 0));
        const MOE__VI acts = v_load(q), more = v_load(q + 64);
        const MOE__VI a_low = MOE__MM(unpacklo_epi64)(acts, more);
        const MOE__VI a_high = MOE__MM(unpackhi_epi64)(acts, more);
        const int odd = q32_block(i, 0) % 2; // 16 bytes behind the even ones, not 18
        const MOE__VI w = q32_load(b + 4 - 2 * odd, BYTES / 2, i);
        const MOE__VI w_low = MOE__MM(shuffle_epi8)(table, v_mask(w, 15));
        const MOE__VI w_high = MOE__MM(shuffle_epi8)(table, v_mask(MOE__MM(srli_epi16)(w, 4), 15));
        const MOE__VI offset = v_set8(16);
        MOE__VI extra = v_quads(v_zero(), offset, a_low, 5);
        extra = v_quads(extra, offset, a_high, 5);
        s[i] = v_quads(v_zero(), w_low, a_low, 5);
        s[i] = MOE__MM(sub_epi32)(v_quads(s[i], w_high, a_high, 5), extra);
    }
    MOE__UNROLL(2)
    for (int i = 0; i < GROUPS / 2; i++) // of an even and an odd block: four in their order
        v_store(sums + MOE__VFLOATS * i, v_hadd(s[i], s[i + GROUPS / 2]));
    MOE__UNROLL(2)
    for (int h = 0; h < 2; h++, b += 2 * BYTES) {
        const __m128i scales = _mm_cvtepu8_epi16(_mm_set_epi64x(
            0, (int64_t)(moe__load_u32(b) | (uint64_t)moe__load_u32(b + BYTES) << 32)));
        const __m256 x = _mm256_cvtepi32_ps(v_load_256(sums + 8 * h));
        if (h)
            out.second = _mm256_mul_ps(x, u_ue4m3(scales));
        else
            out.first = _mm256_mul_ps(x, u_ue4m3(scales));
    }
    return out;
}

// A record that is not whole is read as if it were, where that stays within the rows.
MOE__V void MOE__(dot_q32)(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n,
                           const void *x, float *out, const int type) {
    const int two = type == MOE__INDEX_NVFP4, has_min = MOE__(q32_min)(type);
    const int size = two ? MOE__BYTES_NVFP4 / 2 : q32_size(type); // of 32 weights
    const int n_rest = (int)(n % 256 / 32), n_steps = two || has_min ? 4 : 2;
    const int is_signed = MOE__ISA == 2 && type == MOE__INDEX_IQ4_NL;
    const MOE__VI table = MOE__(q32_table)(type, is_signed ? 0 : 1 << q32_shift(type));
    const uint8_t *rows_end = rows + (size_t)n_rows * row_size;
    uint8_t rest[8 * MOE__BYTES_Q8_0];
    uint32_t there[16]; // of such a record: ones for each sum of each step
    memset(rest, 0, sizeof rest);
    for (int i = 0; i < 16; i++) {
        const int number = has_min ? i / 8 * 4 + i % 4 : i; // of a scale
        there[i] = number < (two ? 2 * n_rest : n_rest) ? 0xFFFFFFFF : 0;
    }
    for (int64_t r = 0; r < n_rows; r++) {
        const uint8_t *b = rows + (size_t)r * row_size;
        const moe__act32 *a = (const moe__act32 *)x;
        __m128 sum = _mm_setzero_ps();
        for (int64_t left = n; left > 0; left -= 256, a++, b += 8 * size) {
            __m128 xs[4], ys[4]; // what is multiplied and added to the sums, in this order
            fetch_ahead(b, rows_end, 8 * size);
            if (left < 256 && rows_end - b < 8 * size) {
                memcpy(rest, b, (size_t)(n_rest * size));
                b = rest;
            }
            if (two) {
                const MOE__(two) p = MOE__(nvfp4_products)(b, a, table);
                MOE__UNROLL(4)
                for (int k = 0; k < 4; k++)
                    ys[k] = _mm_setr_ps(a->d[2 * k], a->d[2 * k], a->d[2 * k + 1], a->d[2 * k + 1]);
                xs[0] = _mm256_castps256_ps128(p.first), xs[1] = _mm256_extractf128_ps(p.first, 1);
                xs[2] = _mm256_castps256_ps128(p.second);
                xs[3] = _mm256_extractf128_ps(p.second, 1);
            } else {
                const __m256 p = MOE__(q32_products)(b, a, table, type);
                xs[0] = _mm256_castps256_ps128(p), ys[0] = _mm_loadu_ps(a->d);
                xs[has_min ? 2 : 1] = _mm256_extractf128_ps(p, 1);
                ys[has_min ? 2 : 1] = _mm_loadu_ps(a->d + 4);
            }
            if (has_min) { // d * q + m; minus the sum of the activations, and minus m
                const __m256 nsum = _mm256_cvtepi32_ps(v_load_256(a->nsum));
                const __m256 y = u_rounded(_mm256_mul_ps(nsum, _mm256_loadu_ps(a->d)));
                const __m256 m =
                    _mm256_xor_ps(MOE__(q32_scales)(b, 2, type), _mm256_set1_ps(-0.0f));
                xs[1] = _mm256_castps256_ps128(m), xs[3] = _mm256_extractf128_ps(m, 1);
                ys[1] = _mm256_castps256_ps128(y), ys[3] = _mm256_extractf128_ps(y, 1);
            }
            MOE__UNROLL(4)
            for (int k = 0; k < n_steps; k++) {
                const __m128 more = _mm_fmadd_ps(xs[k], ys[k], sum);
                const __m128 mask = _mm_castsi128_ps(v_load_128(there + 4 * k));
                sum = left < 256 ? _mm_blendv_ps(sum, more, mask) : more;
            }
        }
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        out[r] = _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
    }
}
#define MOE__DOT_Q32(NAME, name)                                                                \
    MOE__K void MOE__(dot_##name)(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n, \
                                  const void *x, float *out) {                                  \
        MOE__(dot_q32)(rows, row_size, n_rows, n, x, out, MOE__INDEX_##NAME);                   \
    }
MOE__DOT_Q32(Q4_0, q4_0)
MOE__DOT_Q32(Q4_1, q4_1)
MOE__DOT_Q32(Q5_0, q5_0)
MOE__DOT_Q32(Q5_1, q5_1)
MOE__DOT_Q32(Q6_0, q6_0)
MOE__DOT_Q32(Q8_0, q8_0)
MOE__DOT_Q32(IQ4_NL, iq4_nl)
MOE__DOT_Q32(MXFP4, mxfp4)
MOE__DOT_Q32(NVFP4, nvfp4)
#undef MOE__DOT_Q32

// What tiles and dequantize read: up to 256 weights (n) of a row; D: the scale of the row.
typedef void unpack_fn(const uint8_t *b, int n, float D, moe__block *out);

// ---- unpacking blocks of 32 weights ----------------------------------------------------------

// moe__unpack_NAME_avx2 is moe__unpack_NAME for up to 256 weights (n) of a row, the offset added
// to levels but for 8 bits. Nothing behind the blocks is read. All instruction sets use these.
#if MOE__ISA == 2
MOE__V void u_put(moe__block *out, int j, __m256i v) {
    _mm256_storeu_si256((__m256i *)(void *)(out->q + 32 * j), v);
}
#define MOE__ROW_BLOCKS(NAME, name, d_, levels)                                                   \
    MOE__K void MOE__(unpack_##name)(const uint8_t *b, int n, float D, moe__block *out) {         \
        (void)D;                                                                                  \
        for (int j = 0; j < n / 32; j++, b += MOE__BYTES_##NAME) {                                \
            const __m128 d = d_; /* and, where there are mins, minus the min */                   \
            out->d[2 * j] = out->d[2 * j + 1] = _mm_cvtss_f32(d);                                 \
            out->dmin[2 * j] = out->dmin[2 * j + 1] =                                             \
                MOE__OFFSET_##NAME > 0 ? 0 : -_mm_cvtss_f32(_mm_movehdup_ps(d));                  \
            u_put(out, j, levels);                                                                \
        }                                                                                         \
    }

MOE__K void MOE__(unpack_nvfp4)(const uint8_t *b, int n, float D, moe__block *out) {
    (void)D;
    for (int s = 0; s < n / 16; s++) {
        out->d[s] = moe__types_ue4m3(b[36 * (s / 4) + s % 4]);
        out->dmin[s] = 0;
    }
    for (int j = 0; j < n / 32; j++) { // 8 bytes: 16 weights, low nibbles before high ones
        __m128i bytes = v_load_128(b + 36 * (j / 2) + 4 + 16 * (j % 2));
        __m256i x = _mm256_permute4x64_epi64(_mm256_castsi128_si256(bytes), 0x50);
        x = _mm256_srlv_epi64(x, _mm256_setr_epi64x(0, 4, 0, 4));
        x = _mm256_and_si256(x, u_set8(15));
        u_put(out, j, v_lookup(moe__levels_fp4, x, 16, 16));
    }
}
#endif

// ---- layouts read ----------------------------------------------------------------------------

// All block types from their layouts: heads and levels, then kernels.
#if MOE__ISA != 4
MOE__V MOE__VI v_level_of(const int8_t *table, const int n, MOE__VI x, const int bias) {
    return table ? v_lookup(table, x, n, bias) : x;
}
#define MOE__LEVEL_OF(NAME, table, x)                                          \
    v_level_of(moe__levels_##table, (int)sizeof moe__levels_##table, x, MOE__BIAS(NAME))
#define MOE__MORE_NOTHING 0
#define MOE__MORE_MINS MOE__MINS
#define MOE__MORE_SHIFTS MOE__SHIFTS
#define MOE__TO_NOTHING shift // not written
#define MOE__TO_MINS min
#define MOE__TO_SHIFTS shift

#if MOE__ISA == 2 // all instruction sets use these
#define MOE__OF_32(NAME, name, set, set_at, table, level, at)                                     \
    MOE__ROW_BLOCKS(NAME, name, MOE__(d_##set)(b, MOE__ARGS set_at, 0),                           \
                    MOE__LEVEL_OF(NAME, table, MOE__(w_##level)(b, MOE__ARGS at, 0, 0)))
#else
#define MOE__OF_32(NAME, name, set, set_at, table, level, at)
#endif
#define MOE__OF_256(NAME, name, order, set, set_at, scales, scales_at, more, which, which_at,     \
                    table, level, at)                                                             \
    MOE__HEAD(name) {                                                                             \
        const int n = 256 / MOE__PER_##NAME;                                                      \
        h->scale = MOE__(s_##scales)(b, MOE__ARGS scales_at, n);                                  \
        if (MOE__MORE_##more)                                                                     \
            h->MOE__TO_##more = MOE__(s_##which)(b, MOE__ARGS which_at, n);                       \
        h->d = MOE__(d_##set)(b, MOE__ARGS set_at, D);                                            \
    }                                                                                             \
    MOE__LEVEL(name) {                                                                            \
        return MOE__LEVEL_OF(NAME, table,                                                         \
                             MOE__(w_##level)(b, MOE__ARGS at, MOE__##order, v));                 \
    }                                                                                             \
    MOE__TYPE_256(NAME, name, MOE__##order, MOE__MORE_##more)
#define MOE__OF_BOOKS(NAME, name, order, more)                                                    \
    MOE__TYPE_256(NAME, name, MOE__##order, MOE__MORE_##more | MOE__BOOKS)
#define MOE__OF_R4(NAME, name, set, set_at, scales, scales_at, more, which, which_at, table,      \
                   level, at)                                                                     \
    MOE__V void MOE__(head_##name)(const uint8_t *b, const float *D, rows_head *h) {              \
        MOE__(rs_##scales)(b, MOE__ARGS scales_at, h->scale);                                     \
        if (MOE__MORE_##more)                                                                     \
            MOE__(rs_##which)(b, MOE__ARGS which_at, h->MOE__TO_##more);                          \
        MOE__(rd_##set)(b, MOE__ARGS set_at, D, h);                                               \
    }                                                                                             \
    MOE__V MOE__VI MOE__(level_##name)(const uint8_t *b, int j, const int v) {                    \
        return MOE__LEVEL_OF(NAME, table, MOE__(rw_##level)(b, MOE__ARGS at, j, v));              \
    }                                                                                             \
    MOE__TYPE_R4(NAME, name, (MOE__MORE_##more & MOE__SHIFTS) != 0)
#define MOE__OF_ROWS_32(NAME, name, set, set_at, table, level, at)                                \
    MOE__V MOE__VI MOE__(level_##name)(const uint8_t *b, const int v) {                           \
        return MOE__LEVEL_OF(NAME, table, MOE__(rw_##level)(b, MOE__ARGS at, 0, v));              \
    }                                                                                             \
    MOE__TYPE_ROWS_32(NAME, name)
#define MOE__OF_OTHER_32(NAME, name)
#define MOE__OF_OTHER_ROWS(NAME, name)
MOE__BLOCK_TYPES(MOE__READ_LAYOUT)
#undef MOE__LEVEL_OF
#undef MOE__MORE_NOTHING
#undef MOE__MORE_MINS
#undef MOE__MORE_SHIFTS
#undef MOE__TO_NOTHING
#undef MOE__TO_MINS
#undef MOE__TO_SHIFTS
#undef MOE__OF_32
#undef MOE__OF_256
#undef MOE__OF_BOOKS
#undef MOE__OF_R4
#undef MOE__OF_ROWS_32
#undef MOE__OF_OTHER_32
#undef MOE__OF_OTHER_ROWS
#undef MOE__ROW_BLOCKS
#undef MOE__TYPE_256
#undef MOE__TYPE_R4
#undef MOE__TYPE_ROWS_32
#undef MOE__SHIFTS
#undef MOE__BOOKS
#undef MOE__MINS
#undef MOE__HEAD
#undef MOE__LEVEL
#undef MOE__READER
#undef MOE__W
#undef MOE__S
#undef MOE__SET
#undef MOE__RW
#undef MOE__RS
#undef MOE__RSET
#endif // MOE__ISA != 4

#if MOE__ISA == 2
// moe__dequantize_fn for row types; the same bits as moe__types_dequantize: products are rounded
// once, fused or not. What is unpacked has the type's offset added, but for 8 bits.
MOE__K void MOE__(dequantize_blocks)(const moe__type *type, unpack_fn *unpack, const uint8_t *row,
                                     int64_t n, float *out) {
    const float D = u_row_scale(row, type->meta);
    const __m128i bias = _mm_set1_epi8((char)(type->bits == 8 ? 0 : type->offset));
    moe__block block;
    if (type->id == MOE_TYPE_IQ6_K) {
        moe__types_dequantize(type, row, n, out);
        return;
    }
    row += type->meta;
    for (int64_t at = 0; at < n; at += 256, row += 256 / type->block * type->bytes) {
        const int count = (int)moe__min(n - at, 256), by_32 = type->act == MOE__ACT_Q32;
        unpack(row, count, D, &block);
        for (int s = 0; s < count / 16; s++) {
            const float d = by_32 ? block.d[s] : block.d[0] * (float)block.scale[s];
            float min = by_32 ? block.dmin[s] : 0;
            if (!by_32 && !type->offset) min = block.dmin[0] * (float)block.min[s];
            u_store_levels(out + at + 16 * s, _mm_sub_epi8(v_load_128(block.q + 16 * s), bias), d,
                           min);
        }
    }
}
#endif

// ---- tiles: up to 32 rows times many tokens --------------------------------------------------

// For each superblock of 256 weights per row a tile's rows are unpacked once, into a pack that
// stays in the first-level cache, and every token reads it from there:
//
//     for each superblock          unpack 32 rows x 256 weights
//         for each token group     for each panel of rows: one micro-kernel
//
// Element i (32 bits) of a vector belongs to row i; a panel is two vectors of rows. An element
// of the pack is a quad: 4 neighbouring weights of its row as unsigned bytes, the quantized
// value plus an offset that makes it >= 0. The same quad of a token's int8 activations is
// broadcast to all elements; one step multiplies both and adds the 4 products to the element's
// int32 sum. So a block's sums need no horizontal step, and its scales are plain vectors over
// rows. Offsets are powers of two: a sum starts at (minus the sum of the activations) <<
// log2(offset), which undoes the offset exactly.
//
// A micro-kernel keeps the sums of a panel and n tokens in registers: n <= 6 with 32 zmm (12
// int32 and 12 float sums, 2 weights, 1 activation), n <= 4 with 16 ymm (8 int32 sums; the float
// ones lie on the stack). Its text is the same for both; only "products of quads" differs, and
// an instruction set with 256-bit dot products would replace just that.

// What a micro-kernel does: sums[t * 32 + r] += product of the superblock of row r with token t;
// with a scale per 32 activations to the four sums of moe__dot_32, sums[(c * n + t) * 32 + r].
typedef struct tile_job {
    uint8_t *pack;           // of the panel
    const void *const *x;    // the group's activations
    size_t record;           // the superblock's byte offset in each of them
    int64_t n;               // weights per row in this superblock
    int shift;               // log2 of the weights' offset; -1: they have mins
    float *sums;             // of the panel's first row and the group's first token
    const uint8_t *prefetch; // fetch cache lines from here, n_prefetch of them per step (a
    int64_t n_prefetch;      // sub-block), evenly: bursts would stop the kernel
} tile_job;
typedef void tile_kernel_fn(const tile_job *job);

// Unpacks n weights of a panel's rows, which lie `stride` bytes apart. For types with kernels of
// their own.
typedef void MOE__(tile_unpack_fn)(const uint8_t *rows, size_t stride, int64_t n, uint8_t *pack);

// ---- unpacking ----------------

// Rows lie in memory one behind the other, but a vector of the pack has one dword of each row: half
// a panel's rows are loaded 16 bytes at a time and turned, like a matrix of dwords. Turning is as
// much work as unpacking, and both are done once for all tokens.

typedef struct tile_columns {
    MOE__VI v[4];
} tile_columns;
typedef struct tile_pair {
    MOE__VF low, high;
} tile_pair;

// 16 bytes of each row of half a panel, turned: element r of v[i] is dword i of row r.
MOE__V tile_columns tile_turn(const uint8_t *rows, size_t stride) {
    tile_columns c;
#define MOE__ROW(r) _mm_loadu_si128((const __m128i *)(const void *)(rows + (size_t)(r) * stride))
#define MOE__ROWS_2(r) \
    _mm256_inserti128_si256(_mm256_castsi128_si256(MOE__ROW(r)), MOE__ROW(r + 4), 1)
#if MOE__ISA == 3
#define MOE__ROWS(r) \
    _mm512_inserti64x4(_mm512_castsi256_si512(MOE__ROWS_2(r)), MOE__ROWS_2(r + 8), 1)
#else
#define MOE__ROWS(r) MOE__ROWS_2(r)
#endif
    const MOE__VI x0 = MOE__ROWS(0), x1 = MOE__ROWS(1), x2 = MOE__ROWS(2), x3 = MOE__ROWS(3);
#undef MOE__ROWS
#undef MOE__ROWS_2
#undef MOE__ROW
    // Dwords of rows 0-3, named by column: 01 holds columns 0 and 1 of two rows.
    const MOE__VI a01 = MOE__MM(unpacklo_epi32)(x0, x1), b01 = MOE__MM(unpacklo_epi32)(x2, x3);
    const MOE__VI a23 = MOE__MM(unpackhi_epi32)(x0, x1), b23 = MOE__MM(unpackhi_epi32)(x2, x3);
    c.v[0] = MOE__MM(unpacklo_epi64)(a01, b01), c.v[1] = MOE__MM(unpackhi_epi64)(a01, b01);
    c.v[2] = MOE__MM(unpacklo_epi64)(a23, b23), c.v[3] = MOE__MM(unpackhi_epi64)(a23, b23);
    return c;
}

// The two f16 of each dword as f32
MOE__V tile_pair MOE__(tile_halves)(MOE__VI v) {
    tile_pair f;
#if MOE__ISA == 3
    static const uint16_t order[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                       1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    v = _mm512_permutexvar_epi16(v_load(order), v);
    f.low = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
    f.high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
#else
    static const uint8_t order[32] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
                                      0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
    v = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, v_load(order)), 0xD8);
    f.low = _mm256_cvtph_ps(_mm256_castsi256_si128(v));
    f.high = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
#endif
    return f;
}

// The f16 at `rows` of each row of half a panel, as f32
MOE__V MOE__VF MOE__(tile_row_halves)(const uint8_t *rows, size_t stride) {
#define MOE__HALF(v, r, i) \
    v = _mm_insert_epi16(v, moe__load_u16(rows + (size_t)(r + i) * stride), i)
#define MOE__EIGHT(v, r)                                                    \
    __m128i v = _mm_cvtsi32_si128(moe__load_u16(rows + (size_t)(r) * stride)); \
    MOE__HALF(v, r, 1), MOE__HALF(v, r, 2), MOE__HALF(v, r, 3);              \
    MOE__HALF(v, r, 4), MOE__HALF(v, r, 5), MOE__HALF(v, r, 6), MOE__HALF(v, r, 7)
    MOE__EIGHT(low, 0);
#if MOE__ISA == 3
    MOE__EIGHT(high, 8);
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
#else
    return _mm256_cvtph_ps(low);
#endif
#undef MOE__EIGHT
#undef MOE__HALF
}

MOE__V MOE__VI tile_low(MOE__VI v, const int mask) { return v_and(v, MOE__MM(set1_epi32)(mask)); }
MOE__V MOE__VI tile_high_nibbles(MOE__VI v) {
    return tile_low(MOE__MM(srli_epi32)(v, 4), 0x0F0F0F0F);
}

// Blocks of nibbles: Q4_0, Q5_0, IQ4_NL, MXFP4; is_signed: without the type's offset
MOE__V void MOE__(tile_unpack_nibbles)(const uint8_t *rows, size_t stride, int64_t n,
                                       uint8_t *pack, const int type, const int is_signed) {
    const MOE__VI table = MOE__(q32_table)(type, is_signed ? 0 : 1 << q32_shift(type));
    const MOE__VI byte = v_lanes(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
    for (int64_t h = 0; h < 2; h++, rows += MOE__VFLOATS * stride)
        for (int64_t b = 0; b < n / 32; b++) {
            const uint8_t *block = rows + q32_size(type) * (size_t)b;
            const tile_columns c = tile_turn(block + MOE__(q32_low)(type), stride);
            MOE__VI fifth = v_zero();
            if (type == MOE__INDEX_Q5_0) fifth = tile_turn(block + 2, stride).v[0];
            if (type == MOE__INDEX_MXFP4) {
                MOE__VI e = tile_low(tile_turn(block, stride).v[0], 0xFF);
                tile_put_scale(pack, b, h, v_e8m0(e));
            } else {
                tile_put_scale(pack, b, h, MOE__(tile_row_halves)(block, stride));
            }
            MOE__UNROLL(8) for (int i = 0; i < 8; i++) { // a quad: nibbles of 4 bytes
                MOE__VI v = i < 4 ? tile_low(c.v[i], 0x0F0F0F0F) : tile_high_nibbles(c.v[i - 4]);
                if (type == MOE__INDEX_MXFP4 || type == MOE__INDEX_IQ4_NL)
                    v = MOE__MM(shuffle_epi8)(table, v);
                if (type == MOE__INDEX_Q5_0) { // bits 4 i .. 4 i + 3
                    MOE__VI at = MOE__MM(add_epi8)(byte, v_set8((char)(i / 2)));
                    MOE__VI bit = MOE__MM(set1_epi32)(i % 2 ? (int)0x80402010 : 0x08040201);
                    v = v_add_where(v, MOE__MM(shuffle_epi8)(fifth, at), bit, 16);
                }
                tile_put(pack, 8 * b + i, h, v);
            }
        }
}
#define MOE__TILE_NIBBLES(NAME, name)                                                      \
    MOE__K void MOE__(tile_unpack_##name)(const uint8_t *rows, size_t stride, int64_t n,   \
                                          uint8_t *pack) {                                 \
        MOE__(tile_unpack_nibbles)(rows, stride, n, pack, MOE__INDEX_##NAME, 0);           \
    }
MOE__TILE_NIBBLES(Q4_0, q4_0)
MOE__TILE_NIBBLES(Q5_0, q5_0)
MOE__TILE_NIBBLES(MXFP4, mxfp4)
#undef MOE__TILE_NIBBLES

MOE__V void MOE__(tile_unpack_bytes)(const uint8_t *rows, size_t stride, int64_t n, uint8_t *pack,
                                     const int is_signed) {
    const MOE__VI offset = v_set8(is_signed ? 0 : -128); // int8 + 128, modulo 256
    for (int64_t h = 0; h < 2; h++, rows += MOE__VFLOATS * stride)
        for (int64_t b = 0; b < n / 32; b++) {
            const uint8_t *block = rows + 34 * b;
            const tile_columns c = tile_turn(block + 2, stride);
            const tile_columns d = tile_turn(block + 18, stride);
            tile_put_scale(pack, b, h, MOE__(tile_row_halves)(block, stride));
            MOE__UNROLL(4) for (int i = 0; i < 4; i++) {
                tile_put(pack, 8 * b + i, h, MOE__MM(add_epi8)(c.v[i], offset));
                tile_put(pack, 8 * b + 4 + i, h, MOE__MM(add_epi8)(d.v[i], offset));
            }
        }
}

// Four unsigned bytes of each dword
MOE__V void MOE__(tile_put_scales)(uint8_t *pack, int64_t sub_block, int64_t h, MOE__VI s) {
    MOE__UNROLL(4) for (int i = 0; i < 4; i++) {
        tile_put_int(pack, sub_block + i, h, tile_low(s, 0xFF));
        s = MOE__MM(srli_epi32)(s, 8);
    }
}

// Four unsigned bytes of each dword: two vectors of int16 pairs
MOE__V void MOE__(tile_put_mins)(uint8_t *pack, int64_t pair, int64_t h, MOE__VI m) {
    MOE__UNROLL(2) for (int i = 0; i < 2; i++) {
        MOE__VI first = tile_low(m, 0xFF);
        MOE__VI second = tile_low(MOE__MM(slli_epi32)(m, 8), 0xFF0000);
        v_store(pack + TILE_MIN + (2 * (pair + i) + h) * MOE__VBYTES, v_or(first, second));
        m = MOE__MM(srli_epi32)(m, 16);
    }
}

// The head of Q4_K and Q5_K blocks: d, dmin, eight 6-bit scales s and eight 6-bit mins m.
//   dword 1: s0-s3 and the top bits of s4-s7   dword 2: m0-m3 and the top bits of m4-m7
//   dword 3: the low 4 bits of s4-s7 and of m4-m7
MOE__V void MOE__(tile_unpack_head)(const uint8_t *rows, size_t stride, int64_t h, uint8_t *pack) {
    const MOE__VI top = MOE__MM(set1_epi32)(0x30303030);
    const tile_columns c = tile_turn(rows, stride);
    const tile_pair d = MOE__(tile_halves)(c.v[0]); // d, dmin
    MOE__VI s = tile_low(c.v[3], 0x0F0F0F0F), m = tile_high_nibbles(c.v[3]);
    s = v_or_and(s, MOE__MM(srli_epi32)(c.v[1], 2), top);
    m = v_or_and(m, MOE__MM(srli_epi32)(c.v[2], 2), top);
    MOE__(tile_put_scales)(pack, 0, h, tile_low(c.v[1], 0x3F3F3F3F));
    MOE__(tile_put_scales)(pack, 4, h, s);
    MOE__(tile_put_mins)(pack, 0, h, tile_low(c.v[2], 0x3F3F3F3F));
    MOE__(tile_put_mins)(pack, 2, h, m);
    MOE__(tile_put_d)(pack, h, d.low);
    MOE__(tile_put_dmin)(pack, h, d.high);
}

MOE__K void MOE__(tile_unpack_q4_k)(const uint8_t *rows, size_t stride, int64_t n, uint8_t *pack) {
    (void)n;
    for (int64_t h = 0; h < 2; h++, rows += MOE__VFLOATS * stride) {
        MOE__(tile_unpack_head)(rows, stride, h, pack);
        for (int64_t c = 0; c < 8; c++) { // 16 bytes: halves of two sub-blocks
            const tile_columns q = tile_turn(rows + 16 + 16 * c, stride);
            const int64_t quad = 16 * (c / 2) + 4 * (c % 2);
            MOE__UNROLL(4) for (int i = 0; i < 4; i++) {
                tile_put(pack, quad + i, h, tile_low(q.v[i], 0x0F0F0F0F));
                tile_put(pack, quad + 8 + i, h, tile_high_nibbles(q.v[i]));
            }
        }
    }
}

MOE__K void MOE__(tile_unpack_q5_k)(const uint8_t *rows, size_t stride, int64_t n, uint8_t *pack) {
    const MOE__VI fifth = MOE__MM(set1_epi32)(0x10101010);
    (void)n;
    for (int64_t h = 0; h < 2; h++, rows += MOE__VFLOATS * stride) {
        MOE__(tile_unpack_head)(rows, stride, h, pack);
        for (int64_t m = 0; m < 2; m++) { // halves of sub-blocks
            tile_columns bits = tile_turn(rows + 16 + 16 * m, stride);
            for (int64_t c = 0; c < 4; c++) { // two sub-blocks; their fifth bits: bits 0 and 1
                const tile_columns q = tile_turn(rows + 48 + 32 * c + 16 * m, stride);
                const int64_t quad = 16 * c + 4 * m;
                MOE__UNROLL(4) for (int i = 0; i < 4; i++) {
                    MOE__VI a = tile_low(q.v[i], 0x0F0F0F0F);
                    MOE__VI b = tile_high_nibbles(q.v[i]);
                    a = v_or_and(a, MOE__MM(slli_epi32)(bits.v[i], 4), fifth);
                    b = v_or_and(b, MOE__MM(slli_epi32)(bits.v[i], 3), fifth);
                    tile_put(pack, quad + i, h, a);
                    tile_put(pack, quad + 8 + i, h, b);
                    bits.v[i] = MOE__MM(srli_epi32)(bits.v[i], 2);
                }
            }
        }
    }
}

// 16 int8 scales at byte 192 and the f16 d behind them; no load leaves the block of 210 bytes.
MOE__V void MOE__(tile_unpack_tail)(const uint8_t *rows, size_t stride, int64_t h, uint8_t *pack) {
    const tile_columns s = tile_turn(rows + 192, stride);
    const tile_columns e = tile_turn(rows + 194, stride);
    MOE__(tile_put_d)(pack, h, MOE__(tile_halves)(e.v[3]).high);
    MOE__UNROLL(4) for (int i = 0; i < 4; i++) {
        MOE__VI bytes = s.v[i]; // the top one is the last of four scales
        MOE__UNROLL(4) for (int b = 3; b >= 0; b--) {
            tile_put_int(pack, 4 * i + b, h, MOE__MM(srai_epi32)(bytes, 24));
            bytes = MOE__MM(slli_epi32)(bytes, 8);
        }
    }
}

MOE__K void MOE__(tile_unpack_q6_k)(const uint8_t *rows, size_t stride, int64_t n, uint8_t *pack) {
    const MOE__VI top = MOE__MM(set1_epi32)(0x30303030);
    (void)n;
    for (int64_t h = 0; h < 2; h++, rows += MOE__VFLOATS * stride) {
        MOE__(tile_unpack_tail)(rows, stride, h, pack);
        for (int64_t c = 0; c < 4; c++) { // halves of four times 32 weights
            const uint8_t *low = rows + 64 * (c / 2) + 16 * (c % 2);
            const tile_columns a = tile_turn(low, stride);
            const tile_columns b = tile_turn(low + 32, stride);
            const tile_columns t = tile_turn(rows + 128 + 16 * c, stride);
            const int64_t quad = 32 * (c / 2) + 4 * (c % 2);
            MOE__UNROLL(4) for (int i = 0; i < 4; i++) {
                MOE__VI q0 = tile_low(a.v[i], 0x0F0F0F0F);
                MOE__VI q1 = tile_low(b.v[i], 0x0F0F0F0F);
                MOE__VI q2 = tile_high_nibbles(a.v[i]);
                MOE__VI q3 = tile_high_nibbles(b.v[i]);
                q0 = v_or_and(q0, MOE__MM(slli_epi32)(t.v[i], 4), top);
                q1 = v_or_and(q1, MOE__MM(slli_epi32)(t.v[i], 2), top);
                q2 = v_or_and(q2, t.v[i], top);
                q3 = v_or_and(q3, MOE__MM(srli_epi32)(t.v[i], 2), top);
                tile_put(pack, quad + i, h, q0);
                tile_put(pack, quad + 8 + i, h, q1);
                tile_put(pack, quad + 16 + i, h, q2);
                tile_put(pack, quad + 24 + i, h, q3);
            }
        }
    }
}

// How the tiles of a type are made
typedef struct tile_plan {
    tile_kernel_fn *const *kernels; // [n - 2]: for n tokens
    int max_tokens;
    MOE__(tile_unpack_fn) *unpack;
    int chains;             // sums per product, 1 or 4
    int step;               // weights per scale, and per prefetch step
    int block, block_bytes; // weights and bytes of a block
    int record;             // bytes of a superblock's activations
    int shift;              // log2 of the offset that `unpack` adds to weights, or -1
    const moe__type *type;  // not NULL: one of these is used instead of `unpack`
    unpack_fn *unpack_row;
    MOE__SHARED(rows_fn) * unpack_group;
    int order, add; // of unpack_row; what is to be added to levels
} tile_plan;

// What else is there: rows are unpacked one by one to blocks, then turned.
MOE__V tile_columns tile_turn_blocks(const void *from) {
    return tile_turn((const uint8_t *)from, sizeof(moe__block));
}
// Levels of half a panel, n per row, in vectors of an order, plus `more`
#if MOE__ISA == 3
// Vector v of 16 rows: dwords are turned in lanes, then lanes of four times four rows.
MOE__V void MOE__(tile_turn_levels)(const moe__block *block, int order, const int v, __m512i more,
                                    int64_t h, uint8_t *pack) {
    __m512i x[4][4]; // [dword of each lane][4 rows]
    MOE__UNROLL(4)
    for (int g = 0; g < 4; g++) {
        const __m512i r0 = v_load(block[4 * g].q + 64 * v);
        const __m512i r1 = v_load(block[4 * g + 1].q + 64 * v);
        const __m512i r2 = v_load(block[4 * g + 2].q + 64 * v);
        const __m512i r3 = v_load(block[4 * g + 3].q + 64 * v);
        const __m512i a = _mm512_unpacklo_epi32(r0, r1), b = _mm512_unpacklo_epi32(r2, r3);
        const __m512i c = _mm512_unpackhi_epi32(r0, r1), d = _mm512_unpackhi_epi32(r2, r3);
        x[0][g] = _mm512_unpacklo_epi64(a, b), x[1][g] = _mm512_unpackhi_epi64(a, b);
        x[2][g] = _mm512_unpacklo_epi64(c, d), x[3][g] = _mm512_unpackhi_epi64(c, d);
    }
    MOE__UNROLL(4)
    for (int k = 0; k < 4; k++) {
        __m512i y[4];
        v_turn_lanes(x[k], y);
        MOE__UNROLL(4)
        for (int lane = 0; lane < 4; lane++)
            tile_put(pack, 4 * v_group(order, v, lane) + k, h, _mm512_add_epi8(y[lane], more));
    }
}
#else
MOE__V void MOE__(tile_turn_levels)(const moe__block *block, int order, const int v, __m256i more,
                                    int64_t h, uint8_t *pack) {
    (void)order;
    MOE__UNROLL(2)
    for (int i = 2 * v; i < 2 * v + 2; i++) {
        const tile_columns c = tile_turn_blocks(block->q + 16 * i);
        MOE__UNROLL(4)
        for (int k = 0; k < 4; k++) tile_put(pack, 4 * i + k, h, _mm256_add_epi8(c.v[k], more));
    }
}
#endif

// Integer scales, mins and their scales of half a panel; per: weights per scale in the pack
MOE__V void MOE__(tile_turn_scales)(const moe__block *block, int per, int mins, int64_t h,
                                    uint8_t *pack) {
    for (int i = 0; i < 2; i++) { // pairs of int16: numbers 2 k, 2 k + 1 in each dword
        const tile_columns c = tile_turn_blocks(block->scale + 8 * i);
        MOE__UNROLL(4)
        for (int k = 0; k < 4; k++) {
            const MOE__VI high = MOE__MM(srai_epi32)(c.v[k], 16);
            const MOE__VI low = MOE__MM(srai_epi32)(MOE__MM(slli_epi32)(c.v[k], 16), 16);
            const int pair = 4 * i + k;
            tile_put_int(pack, per == 16 ? 2 * pair : pair, h, low);
            if (per == 16) tile_put_int(pack, 2 * pair + 1, h, high);
        }
    }
    uint8_t *min = pack + TILE_MIN + h * MOE__VBYTES;
    for (int i = 0; mins && i < 2; i++) {
        const tile_columns c = tile_turn_blocks(block->min + 8 * i);
        MOE__UNROLL(4)
        for (int k = 0; k < 4; k += per / 16) {
            const MOE__VI high = MOE__MM(slli_epi32)(c.v[(k + 1) % 4], 16);
            const MOE__VI both = v_or(tile_low(c.v[k], 0xFFFF), high);
            v_store(min, per == 16 ? c.v[k] : both);
            min += 2 * MOE__VBYTES;
        }
    }
    const MOE__VI d = tile_turn_blocks(block->d).v[0];
    MOE__VI dmin = tile_turn_blocks(block->dmin).v[0];
    v_store(pack + TILE_D + h * MOE__VBYTES, d);
    dmin = v_xor(dmin, MOE__MM(set1_epi32)((int)0x80000000));
    v_store(pack + TILE_DMIN + h * MOE__VBYTES, dmin);
}
// Scales (or mins) as floats, one per `per` weights
MOE__V void MOE__(tile_turn_f32)(const float *from, int per, int at, int64_t h, uint8_t *pack) {
    for (int i = 0; i < 16; i += 4) {
        const tile_columns c = tile_turn_blocks(from + i);
        for (int k = 0; k < 4; k += per / 16)
            v_store(pack + at + (2 * ((i + k) / (per / 16)) + h) * MOE__VBYTES, c.v[k]);
    }
}

// n weights of half h of a panel, from weight `at` of its rows, of which `left` are there (the
// last stands for those behind it). stage: room for half a panel of blocks.
MOE__K void MOE__(tile_rows)(const tile_plan *plan, const uint8_t *rows, size_t row_size,
                             int64_t left, int64_t at, int64_t n, int64_t h, uint8_t *stage,
                             uint8_t *pack) {
    const moe__type *type = plan->type;
    const size_t skip = (size_t)(at / type->block * type->bytes + type->meta);
    const MOE__VI more = v_set8((char)plan->add);
    moe__block *block = (moe__block *)(void *)stage;
    for (int r = 0; r < MOE__VFLOATS; r++) {
        const uint8_t *row = rows + (size_t)moe__min(h * MOE__VFLOATS + r, left - 1) * row_size;
        const float D = MOE__SHARED(u_row_scale)(row, type->meta);
        plan->unpack_row(row + skip, (int)n, D, block + r);
    }
    for (int v = 0; v < (int)(n + MOE__VBYTES - 1) / MOE__VBYTES; v++)
        MOE__(tile_turn_levels)(block, plan->order, v, more, h, pack);
    if (type->act == MOE__ACT_Q256) {
        MOE__(tile_turn_scales)(block, plan->step, !type->offset, h, pack);
        return;
    }
    MOE__(tile_turn_f32)(block->d, plan->step, TILE_SCALE, h, pack);
    if (!type->offset) MOE__(tile_turn_f32)(block->dmin, plan->step, TILE_MIN, h, pack);
}

// The same of an interleaved type
MOE__K void MOE__(tile_groups)(const tile_plan *plan, const uint8_t *rows, size_t row_size,
                               int64_t left, int64_t at, int64_t n, int64_t h, uint8_t *pack) {
    const moe__type *type = plan->type;
    const uint8_t *group[MOE__VFLOATS / 4];
    float D[MOE__VFLOATS / 4][4];
    MOE__SHARED(rows_out) out;
    out.pack = pack, out.half = h, out.per = plan->step, out.add = plan->add;
    for (int g = 0; g < MOE__VFLOATS / type->rows; g++) {
        const int64_t row = moe__min(h * MOE__VFLOATS + g * type->rows, left - type->rows);
        const uint8_t *p = rows + (size_t)row * row_size;
        if (type->meta == 4) memcpy(D[g], p, sizeof D[g]);
        group[g] = p + (size_t)type->rows * (size_t)(type->meta + at / type->block * type->bytes);
    }
    plan->unpack_group(group, (int)n, (const float(*)[4])D, &out);
}

// ---- the loops over superblocks and tokens --------

// What is left to prefetch, in cache lines, and how many of them per step
typedef struct tile_ahead {
    const uint8_t *at;
    int64_t left, per_step;
} tile_ahead;

// Copies n_bytes of each row, `pitch` bytes apart; the rest of a pitch and missing rows are
// zero.
MOE__K void MOE__(tile_stage)(const uint8_t *rows, size_t stride, int64_t n_rows, size_t n_bytes,
                              size_t pitch, int64_t n_rows_out, uint8_t *stage) {
    for (int64_t r = 0; r < n_rows_out; r++, stage += pitch) {
        const size_t used = r < n_rows ? n_bytes : 0;
        if (used) memcpy(stage, rows + (size_t)r * stride, used);
        memset(stage + used, 0, pitch - used);
    }
}

// How tokens are cut into groups of nearly equal size (small ones are slow): the first `longer`
// groups have one more than the others.
typedef struct tile_cut {
    int64_t n_tokens, n_groups, each, longer;
} tile_cut;
MOE__V tile_cut MOE__(tile_cut_of)(const tile_plan *plan, int64_t n_tokens) {
    tile_cut cut;
    cut.n_tokens = n_tokens;
    cut.n_groups = (n_tokens + plan->max_tokens - 1) / plan->max_tokens;
    cut.each = n_tokens / cut.n_groups;
    cut.longer = n_tokens % cut.n_groups;
    return cut;
}

// One superblock, already unpacked, times the tokens of a cut
MOE__K void MOE__(tile_tokens)(const tile_plan *plan, tile_job *job, int64_t n_panels,
                               const void *const *x, const tile_cut *cut, uint8_t *scratch,
                               tile_ahead *ahead) {
    float *sums = (float *)(void *)(scratch + TILE_SUMS_AT);
    for (int64_t g = 0; g < cut->n_groups; g++) {
        const int64_t count = cut->each + (g < cut->longer);
        job->x = x;
        for (int64_t p = 0; p < n_panels; p++) {
            job->pack = scratch + p * TILE_PACK;
            job->sums = sums + p * MOE__PANEL;
            job->prefetch = ahead->at;
            job->n_prefetch = ahead->left > 0 ? ahead->per_step : 0;
            plan->kernels[count - 2](job);
            if (job->n_prefetch) {
                const int64_t lines = job->n_prefetch * (job->n / plan->step);
                ahead->at += 64 * lines;
                ahead->left -= lines;
            }
        }
        x += count;
        sums += count * plan->chains * MOE__TILE_ROWS;
    }
}

// A tile times at most TILE_CHUNK tokens; the sums end in the scratch.
MOE__K void MOE__(tile_chunk)(const tile_plan *plan, const uint8_t *rows, size_t row_size,
                              int64_t n_rows, int64_t n, const void *const *x, const tile_cut *cut,
                              uint8_t *scratch, tile_ahead *ahead) {
    const int64_t n_panels = (n_rows + MOE__PANEL - 1) / MOE__PANEL;
    const size_t pitch = 256 / (size_t)plan->block * (size_t)plan->block_bytes;
    uint8_t *stage = scratch + MOE__(TILE_STAGE_AT);
    tile_job job;
    memset(&job, 0, sizeof job);
    job.shift = plan->shift;
    for (int64_t p = 0; p < n_panels; p++)
        memset(scratch + p * TILE_PACK + TILE_START, 0, MOE__TILE_TOKENS * 64);
    memset(scratch + TILE_SUMS_AT, 0,
           (size_t)(cut->n_tokens * plan->chains * MOE__TILE_ROWS) * sizeof(float));
    for (int64_t first = 0; first < n; first += 256) {
        const uint8_t *from = rows;
        size_t stride = row_size;
        job.n = moe__min(n - first, 256);
        // A copy of the rows is unpacked where a panel is not full (nothing is read behind a
        // row), and where rows lie so that they compete for the same few lines of the cache
        // while they are turned (4 times slower).
        if (!plan->type && (n_rows % MOE__PANEL || row_size % 2048 == 0)) {
            const size_t bytes = (size_t)(job.n / plan->block * plan->block_bytes);
            MOE__(tile_stage)(rows, row_size, n_rows, bytes, pitch, n_panels * MOE__PANEL, stage);
            from = stage, stride = pitch;
        }
        for (int64_t p = 0; p < n_panels; p++) {
            uint8_t *panel = scratch + p * TILE_PACK;
            from += (size_t)(p ? MOE__PANEL : 0) * stride;
            const int64_t left = n_rows - p * MOE__PANEL;
            for (int h = 0; plan->type && h < 2; h++) {
                if (plan->unpack_row)
                    MOE__(tile_rows)(plan, from, row_size, left, first, job.n, h, stage, panel);
                else
                    MOE__(tile_groups)(plan, from, row_size, left, first, job.n, h, panel);
            }
            if (!plan->type) plan->unpack(from, stride, job.n, panel);
        }
        MOE__(tile_tokens)(plan, &job, n_panels, x, cut, scratch, ahead);
        if (!plan->type) rows += pitch;
        job.record += (size_t)plan->record;
    }
}

// Results from the sums of all tokens of a cut
MOE__K void MOE__(tile_out)(const tile_plan *plan, float *sums, int64_t n_rows, const tile_cut *cut,
                            float *out, int64_t out_stride) {
    for (int64_t g = 0; g < cut->n_groups; g++) {
        const int64_t n = cut->each + (g < cut->longer);
        for (int64_t i = 0; i < n * MOE__TILE_ROWS && plan->chains == 4; i += MOE__VFLOATS) {
            MOE__VF x[4];
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++) x[c] = MOE__MM(loadu_ps)(sums + c * n * MOE__TILE_ROWS + i);
            x[0] = MOE__MM(add_ps)(MOE__MM(add_ps)(x[0], x[2]), MOE__MM(add_ps)(x[1], x[3]));
            MOE__MM(storeu_ps)(sums + i, x[0]);
        }
        for (int64_t i = 0; i < n; i++, out += out_stride)
            memcpy(out, sums + i * MOE__TILE_ROWS, (size_t)n_rows * sizeof *out);
        sums += n * plan->chains * MOE__TILE_ROWS;
    }
}

// moe__tile_fn for any type
MOE__K void MOE__(tile_run)(const tile_plan *plan, const uint8_t *rows, size_t row_size,
                            int64_t n_rows, int64_t n, const void *const *x, int64_t n_tokens,
                            float *out, int64_t out_stride, void *pack, const uint8_t *prefetch,
                            size_t prefetch_size) {
    uint8_t *scratch = (uint8_t *)pack;
    float *sums = (float *)(void *)(scratch + TILE_SUMS_AT);
    if (n_tokens == 1) { // nobody's case: dot products are for that
        const void *const twice[2] = {x[0], x[0]};
        float both[2 * MOE__TILE_ROWS];
        MOE__(tile_run)(plan, rows, row_size, n_rows, n, twice, 2, both, MOE__TILE_ROWS, pack,
                        prefetch, prefetch_size);
        memcpy(out, both, (size_t)n_rows * sizeof *out);
        return;
    }
    const int64_t most = moe__min(256, MOE__(TILE_CHUNK) / plan->chains); // tokens
    const int64_t n_chunks = (n_tokens + most - 1) / most;
    const int64_t n_panels = (n_rows + MOE__PANEL - 1) / MOE__PANEL;
    const int64_t n_groups = (n_tokens + plan->max_tokens - 1) / plan->max_tokens;
    const int64_t n_steps = moe__max(1, n_groups * n_panels * (n / plan->step));
    tile_ahead ahead;
    ahead.at = prefetch;
    ahead.left = (int64_t)((prefetch_size + 63) / 64);
    ahead.per_step = (ahead.left + n_steps - 1) / n_steps;
    for (int64_t c = 0; c < n_chunks; c++) {
        const int64_t count = n_tokens / n_chunks + (c < n_tokens % n_chunks);
        const tile_cut cut = MOE__(tile_cut_of)(plan, count);
        MOE__(tile_chunk)(plan, rows, row_size, n_rows, n, x, &cut, scratch, &ahead);
        MOE__(tile_out)(plan, sums, n_rows, &cut, out, out_stride);
        x += count;
        out += count * out_stride;
    }
}

#endif // MOE__ISA != 4

// ---- products of quads --------

// The kernels multiply `bits`-bit weights (4, 6 or 8, unsigned) with any int8, and the int32 sum
// of a sub-block is exact. begin makes an accumulator, dot adds a quad to it (dot2: two quads),
// end turns it into the int32 sum; `start` is where that sum starts.
// - VNNI multiplies and adds a quad by one instruction, whatever the bits.
// - AVX2 adds products in pairs to int16, saturating. 4 bits: the 8 pairs of a sub-block that
//   meet in one int16, 2 * 15 * 128 each, fit; end widens their sum. 6 bits: 2 pairs fit,
//   2 * 63 * 128 each; dot2 widens at once. 8 bits: not one fits; weights keep their sign and
//   are widened to int16 before, the even and the odd ones of a quad, and so are activations.
#if MOE__ISA == 4
MOE__V __m256i v_dot_u8(__m256i acc, __m256i a, __m256i b) {
#if MOE__VNNI_EVEX
    return _mm256_dpbusd_epi32(acc, a, b);
#else
    return _mm256_dpbusd_avx_epi32(acc, a, b);
#endif
}
#endif
#if MOE__VNNI
MOE__V MOE__VI MOE__(tile_begin)(MOE__VI start, const int bits) { return (void)bits, start; }
MOE__V MOE__VI tile_dot(MOE__VI sum, MOE__VI w, MOE__VI x) { return v_dot_u8(sum, w, x); }
MOE__V MOE__VI tile_end(MOE__VI sum, MOE__VI start, const int bits) {
    return (void)bits, (void)start, sum;
}
#else
MOE__V __m256i MOE__(tile_begin)(__m256i start, const int bits) {
    return bits == 6 ? start : _mm256_setzero_si256();
}
// The even or the odd one of each two int8, as int16
MOE__V __m256i tile_even(__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
MOE__V __m256i tile_odd(__m256i x) { return _mm256_srai_epi16(x, 8); }
// 256 int8 so: what belongs to byte 4 i of `q` is at bytes 4 i (even) and 256 + 4 i (odd).
MOE__V void MOE__(tile_widen)(const uint8_t *q, uint8_t *out) {
    for (int i = 0; i < 256; i += 32) {
        const __m256i x = v_load_256(q + i);
        _mm256_storeu_si256((__m256i *)(void *)(out + i), tile_even(x));
        _mm256_storeu_si256((__m256i *)(void *)(out + 256 + i), tile_odd(x));
    }
}
MOE__V __m256i tile_dot_i16(__m256i sum, __m256i w, __m256i x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
    __asm__("" : "+x"(sum));
    return sum;
}
MOE__V __m256i tile_dot(__m256i sum, __m256i w, __m256i x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
    __asm__("" : "+x"(sum)); // GCC would add in another order, with all products alive at once
    return sum;
}
MOE__V __m256i MOE__(tile_dot2)(__m256i sum, __m256i w0, __m256i w1, __m256i x0, __m256i x1) {
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, u_set16(1)));
    __asm__("" : "+x"(sum));
    return sum;
}
MOE__V __m256i tile_end(__m256i sum, __m256i start, const int bits) {
    if (bits != 4) return sum;
    return _mm256_add_epi32(start, _mm256_madd_epi16(sum, u_set16(1)));
}
#endif

// ---- micro-kernels ------------

// All loops over tokens run to MOE__TILE_TOKENS with a condition on n, which is a constant once
// inlined: unrolled completely, they leave no array in memory. Sums are [token][2 vectors of
// rows]: int32 of a sub-block, then of a superblock (ints) or, with a scale per 32 activations,
// floats.
#define MOE__EACH_TOKEN(t)                                \
    MOE__UNROLL(MOE__TILE_TOKENS)                         \
    for (int t = 0; t < MOE__TILE_TOKENS; t++)            \
        if (t < n)

MOE__V MOE__VI MOE__(tile_copies)(const uint8_t *p) {
    return MOE__MM(set1_epi32)((int)moe__load_u32(p));
}

#if MOE__ISA != 4
// Minus the sums of 8 sub-blocks' activations, from number i
MOE__V __m256i MOE__(tile_sums)(const uint8_t *x, int i, int quads, int per_256) {
    if (!per_256 && quads == 4) { // blocks of 32 with a scale per 16: not in the record
        __m256i four[4];
        MOE__UNROLL(4)
        for (int k = 0; k < 4; k++) {
            __m256i q = MOE__AVX2(u_act32)((const int8_t *)x, i / 2 + k);
            q = _mm256_maddubs_epi16(u_set8(1), q);
            four[k] = _mm256_madd_epi16(q, u_set16(-1));
        }
        __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(four[0], four[1]),
                                         _mm256_hadd_epi32(four[2], four[3]));
        return _mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    if (!per_256) return v_load_256(x + offsetof(moe__act32, nsum));
    if (quads == 4) return v_load_256(x + offsetof(moe__act256, nsum) + 4 * i);
    __m256i sums = _mm256_cvtepi16_epi32(v_load_128(x + offsetof(moe__act256, sum32)));
    return _mm256_sub_epi32(_mm256_setzero_si256(), sums);
}
// Where the sums of n tokens start, of all sub-blocks: minus the sums of the activations,
// shifted; with mins: 0 (integer ones: tile_chunk has written that). Kept in memory: shifts would
// compete with the multiplications. The rare types are done here, which have a scale of the
// activations per 32: those with mins, whose sums are kept as floats, too, or with 4 quads.
MOE__K void MOE__(tile_starts)(const tile_job *job, int n, int quads, int mins) {
    const __m128i shift = _mm_cvtsi32_si128(job->shift);
    for (int t = 0; t < n; t++) {
        const uint8_t *x = (const uint8_t *)job->x[t] + job->record;
        uint8_t *starts = job->pack + TILE_START + 64 * t;
        for (int i = 0; i < (quads == 4 ? 16 : 8); i += 8) {
            const __m256i sums = MOE__(tile_sums)(x, i, quads, 0);
            if (mins) {
                const void *d = x + offsetof(moe__act32, d);
                const __m256 scale = _mm256_loadu_ps((const float *)d);
                const __m256 f = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale);
                u_store(job->pack + MOE__(TILE_ACT) + 64 * t + 4 * i, _mm256_castps_si256(f));
            }
            u_store(starts + 4 * i, _mm256_sll_epi32(sums, shift));
        }
    }
}
#endif

// Quads `at` .. of a sub-block (one, or as many as the instruction set takes at once) times all
// tokens; w: their weights; x: where the quad is in each token's activations
#if !MOE__VNNI
MOE__V void MOE__(tile_quad_signed)(__m256i (*a)[2], const uint8_t *w, const uint8_t *x,
                                    const int n) {
    const __m256i w0 = v_load(w), w1 = v_load(w + MOE__VBYTES);
    const __m256i even0 = tile_even(w0), odd0 = tile_odd(w0);
    const __m256i even1 = tile_even(w1), odd1 = tile_odd(w1);
    MOE__EACH_TOKEN(t) {
        const __m256i even = MOE__(tile_copies)(x + 512 * t);
        const __m256i odd = MOE__(tile_copies)(x + 512 * t + 256);
        a[t][0] = tile_dot_i16(a[t][0], even0, even);
        a[t][1] = tile_dot_i16(a[t][1], even1, even);
        a[t][0] = tile_dot_i16(a[t][0], odd0, odd);
        a[t][1] = tile_dot_i16(a[t][1], odd1, odd);
    }
}
MOE__V void MOE__(tile_two_quads)(__m256i (*a)[2], const uint8_t *w, const uint8_t *const *x,
                                  int64_t at, const int n) {
    const __m256i w00 = v_load(w), w01 = v_load(w + MOE__VBYTES);
    const __m256i w10 = v_load(w + 2 * MOE__VBYTES), w11 = v_load(w + 3 * MOE__VBYTES);
    MOE__EACH_TOKEN(t) {
        const __m256i b0 = MOE__(tile_copies)(x[t] + at), b1 = MOE__(tile_copies)(x[t] + at + 4);
        a[t][0] = MOE__(tile_dot2)(a[t][0], w00, w10, b0, b1);
        a[t][1] = MOE__(tile_dot2)(a[t][1], w01, w11, b0, b1);
    }
}
#endif
MOE__V void MOE__(tile_quad)(MOE__VI (*a)[2], const uint8_t *w, const uint8_t *const *x,
                             int64_t at, const int n) {
    const MOE__VI w0 = v_load(w), w1 = v_load(w + MOE__VBYTES);
    MOE__EACH_TOKEN(t) {
        const MOE__VI b = MOE__(tile_copies)(x[t] + at);
        a[t][0] = tile_dot(a[t][0], w0, b);
        a[t][1] = tile_dot(a[t][1], w1, b);
    }
}
// Four quads of a sub-block, whose activations are at byte `at` of the records
MOE__V void MOE__(tile_four_quads)(MOE__VI (*a)[2], const uint8_t *w, const uint8_t *const *x,
                                   int64_t at, const uint8_t *wide, const int n, const int bits) {
    (void)wide, (void)bits;
    MOE__UNROLL(4)
    for (int q = 0; q < 4; q++, w += 2 * MOE__VBYTES, at += 4) {
#if !MOE__VNNI
        if (bits == 8) {
            MOE__(tile_quad_signed)(a, w, wide + at, n);
            continue;
        }
        if (bits == 6) {
            if (q % 2 == 0) MOE__(tile_two_quads)(a, w, x, at, n);
            continue;
        }
#endif
        MOE__(tile_quad)(a, w, x, at, n);
    }
}
// Sums of a sub-block of 4 or 8 quads, whose activations begin at byte `base` of the records (see
// moe__act256_at); starts: where they start, for each token 64 bytes apart
MOE__V void MOE__(tile_sub_block)(MOE__VI (*a)[2], const uint8_t *w, const uint8_t *const *x,
                                  int64_t base, const uint8_t *starts, const uint8_t *wide,
                                  const int n, const int quads, const int bits, const int per_256,
                                  const int from_zero) {
    MOE__EACH_TOKEN(t) {
        const MOE__VI start = from_zero ? v_zero() : MOE__(tile_copies)(starts + 64 * t);
        a[t][0] = a[t][1] = MOE__(tile_begin)(start, bits);
    }
    MOE__(tile_four_quads)(a, w, x, base, wide, n, bits);
    if (quads == 8) {
        const int64_t at = base + (per_256 ? 16 : 64);
        MOE__(tile_four_quads)(a, w + 8 * MOE__VBYTES, x, at, wide, n, bits);
    }
    MOE__EACH_TOKEN(t) {
        const MOE__VI start = from_zero ? v_zero() : MOE__(tile_copies)(starts + 64 * t);
        a[t][0] = tile_end(a[t][0], start, bits);
        a[t][1] = tile_end(a[t][1], start, bits);
    }
}

// See "the product of quantized rows with activations" in >>types. Scales per 256 activations:
// ints += scale * sum of the sub-block.
MOE__V void MOE__(tile_scale_ints)(MOE__VI (*ints)[2], MOE__VI (*a)[2], const uint8_t *scales,
                                   const int n) {
    const MOE__VI scale0 = v_load(scales), scale1 = v_load(scales + MOE__VBYTES);
    MOE__EACH_TOKEN(t) {
        ints[t][0] = MOE__MM(add_epi32)(ints[t][0], MOE__MM(mullo_epi32)(a[t][0], scale0));
        ints[t][1] = MOE__MM(add_epi32)(ints[t][1], MOE__MM(mullo_epi32)(a[t][1], scale1));
    }
}
// Per 32: f += scale * sum of the sub-block * the token's scale - min * sum of the activations,
// where f are the sums of moe__dot_32 that the sub-block belongs to; d: where the scale is in each
// record; acts: those sums, for each token 64 bytes apart
MOE__V void MOE__(tile_scale_floats)(MOE__VF (*f)[2], MOE__VI (*a)[2], const uint8_t *scales,
                                     const uint8_t *min, const uint8_t *const *x, int64_t d,
                                     const uint8_t *acts, const int n, const int mins) {
    const MOE__VF scale0 = f_load(scales), scale1 = f_load(scales + MOE__VBYTES);
    const MOE__VF min0 = f_load(min), min1 = f_load(min + MOE__VBYTES);
    MOE__EACH_TOKEN(t) {
        const MOE__VF scale = MOE__MM(set1_ps)(moe__load_f32(x[t] + d));
        const MOE__VF p0 = MOE__MM(mul_ps)(MOE__MM(cvtepi32_ps)(a[t][0]), scale0);
        const MOE__VF p1 = MOE__MM(mul_ps)(MOE__MM(cvtepi32_ps)(a[t][1]), scale1);
        f[t][0] = MOE__MM(fmadd_ps)(p0, scale, f[t][0]);
        f[t][1] = MOE__MM(fmadd_ps)(p1, scale, f[t][1]);
        if (mins) {
            const MOE__VF b = MOE__MM(set1_ps)(moe__load_f32(acts + 64 * t));
            f[t][0] = MOE__MM(fmadd_ps)(min0, b, f[t][0]);
            f[t][1] = MOE__MM(fmadd_ps)(min1, b, f[t][1]);
        }
    }
}
// The end of a superblock: sums += (d * ints - dmin * a) * the token's scale, a being the sum over
// its sub-blocks of min * sum of the activations: int16 pairs, 2 sub-blocks each
MOE__V void MOE__(tile_add_ints)(const tile_job *job, MOE__VI (*ints)[2], const uint8_t *const *x,
                                 const int n, const int quads, const int mins) {
    const uint8_t *d = job->pack + TILE_D, *dmin = job->pack + TILE_DMIN;
    const MOE__VF scale0 = f_load(d), scale1 = f_load(d + MOE__VBYTES);
    const MOE__VF min0 = f_load(dmin), min1 = f_load(dmin + MOE__VBYTES);
    MOE__VI a[MOE__TILE_TOKENS][2];
    if (mins) {
        const uint8_t *min = job->pack + TILE_MIN;
        int64_t at = quads == 4 ? offsetof(moe__act256, sum16) : offsetof(moe__act256, sum32);
        MOE__EACH_TOKEN(t) a[t][0] = a[t][1] = v_zero();
        for (int p = 0; p < 32 / quads; p++, at += 4, min += 2 * MOE__VBYTES) {
            const MOE__VI m0 = v_load(min), m1 = v_load(min + MOE__VBYTES);
            MOE__EACH_TOKEN(t) {
                const MOE__VI b = MOE__(tile_copies)(x[t] + at);
                a[t][0] = v_dot_i16(a[t][0], m0, b);
                a[t][1] = v_dot_i16(a[t][1], m1, b);
            }
        }
    }
    MOE__EACH_TOKEN(t) {
        float *s0 = job->sums + t * MOE__TILE_ROWS, *s1 = s0 + MOE__VFLOATS;
        const MOE__VF scale = MOE__MM(set1_ps)(moe__load_f32(x[t] + offsetof(moe__act256, d)));
        MOE__VF p0 = MOE__MM(mul_ps)(MOE__MM(cvtepi32_ps)(ints[t][0]), scale0);
        MOE__VF p1 = MOE__MM(mul_ps)(MOE__MM(cvtepi32_ps)(ints[t][1]), scale1);
        if (mins) {
            p0 = MOE__MM(fmadd_ps)(MOE__MM(cvtepi32_ps)(a[t][0]), min0, p0);
            p1 = MOE__MM(fmadd_ps)(MOE__MM(cvtepi32_ps)(a[t][1]), min1, p1);
        }
        MOE__MM(storeu_ps)(s0, MOE__MM(fmadd_ps)(p0, scale, MOE__MM(loadu_ps)(s0)));
        MOE__MM(storeu_ps)(s1, MOE__MM(fmadd_ps)(p1, scale, MOE__MM(loadu_ps)(s1)));
    }
}

// n tokens; quads: of a sub-block, 8, or 4 with a scale per 16 weights (a number known to the
// compiler: asking for it as it runs took a tenth of the speed); bits: see "products of quads";
// per_256: whether the activations are moe__act256 or moe__act32; mins: whether weights have mins,
// and no offset.
MOE__V void MOE__(tile_quantized)(const tile_job *job, const int n, const int quads, const int bits,
                                  const int per_256, const int mins) {
    const uint8_t *x[MOE__TILE_TOKENS], *prefetch = job->prefetch;
    const uint8_t *starts = job->pack + TILE_START, *acts = job->pack + MOE__SHARED(TILE_ACT);
    uint8_t *wide = job->pack + TILE_MIN; // AVX2: signed weights have no mins and no start
    const int from_zero = !MOE__VNNI && (mins || bits == 8);
    const int64_t scale_at = offsetof(moe__act32, d);
    const int64_t n_blocks = job->n / (4 * quads), n_prefetch = job->n_prefetch;
    MOE__VI a[MOE__TILE_TOKENS][2], ints[MOE__TILE_TOKENS][2];
    MOE__VF f[MOE__TILE_TOKENS][2];
    MOE__EACH_TOKEN(t) {
        x[t] = (const uint8_t *)job->x[t] + job->record;
        ints[t][0] = ints[t][1] = v_zero();
    }
#if !MOE__VNNI
    if (bits == 8) {
        for (int t = 0; t < n; t++)
            MOE__(tile_widen)((const uint8_t *)job->x[t] + job->record, wide + 512 * t);
    } else
#endif
    if (!mins && (per_256 || quads == 8)) {
        const __m128i shift = _mm_cvtsi32_si128(job->shift);
        MOE__EACH_TOKEN(t) {
            uint8_t *to = job->pack + TILE_START + 64 * t;
            __m256i sums = MOE__SHARED(tile_sums)(x[t], 0, quads, per_256);
            u_store(to, _mm256_sll_epi32(sums, shift));
            if (quads == 8) continue;
            sums = MOE__SHARED(tile_sums)(x[t], 8, quads, per_256);
            u_store(to + 32, _mm256_sll_epi32(sums, shift));
        }
    } else if (!per_256) {
        MOE__SHARED(tile_starts)(job, n, quads, mins);
    }
    // All sub-blocks one after another, or two at a time, which belong to the same sums
    const int64_t step = per_256 ? 1 : 4, n_passes = per_256 ? 1 : (n_blocks + 7) / 8 * 4;
    for (int64_t pass = 0; pass < n_passes; pass++) {
        const int64_t chain = pass % 4, first = pass / 4 * 8 + chain;
        const int64_t end = per_256 ? n_blocks : moe__min(first - chain + 8, n_blocks);
        const uint8_t *weights = job->pack + first * 2 * MOE__VBYTES * quads;
        const uint8_t *scales = job->pack + TILE_SCALE + first * 2 * MOE__VBYTES;
        float *sums = job->sums + n * chain * MOE__TILE_ROWS;
        MOE__EACH_TOKEN(t) {
            if (per_256) continue;
            f[t][0] = f_load(sums + t * MOE__TILE_ROWS);
            f[t][1] = f_load(sums + t * MOE__TILE_ROWS + MOE__VFLOATS);
        }
        for (int64_t j = first; j < end; j += step) {
            int64_t base = per_256 ? moe__act256_at(4 * quads * (int)j)
                                   : moe__act32_at(4 * quads * (int)j);
            __asm__("" : "+r"(base)); // clang would make an address of its own for each quad
            for (int64_t i = 0; i < n_prefetch; i++, prefetch += 64) fetch_line_far(prefetch);
            MOE__(tile_sub_block)(a, weights, x, base, starts + 4 * j, wide, n, quads, bits,
                                  per_256, from_zero);
            if (per_256)
                MOE__(tile_scale_ints)(ints, a, scales, n);
            else
                MOE__(tile_scale_floats)(f, a, scales, job->pack + TILE_MIN + j * 2 * MOE__VBYTES,
                                         x, scale_at + 4 * (quads == 4 ? j / 2 : j), acts + 4 * j,
                                         n, mins);
            weights += step * 2 * MOE__VBYTES * quads;
            scales += step * 2 * MOE__VBYTES;
        }
        MOE__EACH_TOKEN(t) {
            if (per_256) continue;
            f_store(sums + t * MOE__TILE_ROWS, f[t][0]);
            f_store(sums + t * MOE__TILE_ROWS + MOE__VFLOATS, f[t][1]);
        }
    }
    if (per_256) MOE__(tile_add_ints)(job, ints, x, n, quads, mins);
}

// ---- one kernel per type ------

#define MOE__TILE_KERNEL(name, n, ...)                             \
    MOE__K void MOE__(tile_##name##_##n)(const tile_job *job) {    \
        MOE__(tile_quantized)(job, n, __VA_ARGS__);                \
    }
// Names of the quantized kernels: q: a scale of the activations per 32 weights, k: per 256; then
// the weights per scale; m: with mins where there are kernels without; the bits of a weight, if
// they matter.
#if MOE__ISA == 3
#define MOE__TILE_KERNELS(name, ...)                                                          \
    MOE__TILE_KERNEL(name, 2, __VA_ARGS__)                                                    \
    MOE__TILE_KERNEL(name, 3, __VA_ARGS__)                                                    \
    MOE__TILE_KERNEL(name, 4, __VA_ARGS__)                                                    \
    MOE__TILE_KERNEL(name, 5, __VA_ARGS__)                                                    \
    MOE__TILE_KERNEL(name, 6, __VA_ARGS__)                                                    \
    static tile_kernel_fn *const MOE__(tile_kernels_##name)[] = {                             \
        MOE__(tile_##name##_2), MOE__(tile_##name##_3), MOE__(tile_##name##_4),               \
        MOE__(tile_##name##_5), MOE__(tile_##name##_6)};
#else
#define MOE__TILE_KERNELS(name, ...)                                                          \
    MOE__TILE_KERNEL(name, 2, __VA_ARGS__)                                                    \
    MOE__TILE_KERNEL(name, 3, __VA_ARGS__)                                                    \
    MOE__TILE_KERNEL(name, 4, __VA_ARGS__)                                                    \
    static tile_kernel_fn *const MOE__(tile_kernels_##name)[] = {                             \
        MOE__(tile_##name##_2), MOE__(tile_##name##_3), MOE__(tile_##name##_4)};
#endif
#if MOE__VNNI
#define MOE__TILE_OF(name, bits) MOE__(tile_kernels_##name)
MOE__TILE_KERNELS(q32, 8, 8, 0, job->shift < 0)
MOE__TILE_KERNELS(q16, 4, 8, 0, 0)
MOE__TILE_KERNELS(k32, 8, 8, 1, job->shift < 0)
MOE__TILE_KERNELS(k16, 4, 8, 1, job->shift < 0)
#else
#define MOE__TILE_OF(name, bits) MOE__(tile_kernels_##name##_##bits)
MOE__TILE_KERNELS(q32_4, 8, 4, 0, 0)
MOE__TILE_KERNELS(q32_6, 8, 6, 0, 0)
MOE__TILE_KERNELS(q32_8, 8, 8, 0, 0)
MOE__TILE_KERNELS(q32m_6, 8, 6, 0, 1)
MOE__TILE_KERNELS(q16_6, 4, 6, 0, 0)
MOE__TILE_KERNELS(k32_4, 8, 4, 1, 1)
MOE__TILE_KERNELS(k32_6, 8, 6, 1, 1)
MOE__TILE_KERNELS(k16_6, 4, 6, 1, 0)
MOE__TILE_KERNELS(k16_8, 4, 8, 1, 0)
MOE__TILE_KERNELS(k16m_4, 4, 4, 1, 1)
#endif

// The kernels for what tile_rows and tile_groups make of a type, with a scale per *per weights, 16
// or 32. Where there are no kernels for 32 (a compile takes long enough), scales are given twice.
MOE__V tile_kernel_fn *const *MOE__(tile_kernels_of)(const moe__type *type, int *per) {
    const int wide = type->bits > 6; // matters where it is in the names
    (void)wide;
    *per = type->per;
    if (type->act == MOE__ACT_Q32) {
        if (type->per == 16) return MOE__TILE_OF(q16, 6);
#if !MOE__VNNI
        if (type->offset == 0) return MOE__TILE_OF(q32m, 6);
#endif
        return wide ? MOE__TILE_OF(q32, 8) : MOE__TILE_OF(q32, 6);
    }
#if MOE__VNNI
    return type->per == 16 ? MOE__TILE_OF(k16, 8) : MOE__TILE_OF(k32, 8);
#else
    if (type->offset == 0)
        return type->per == 16 ? MOE__TILE_OF(k16m, 4) : MOE__TILE_OF(k32, 6);
    *per = 16;
    return wide ? MOE__TILE_OF(k16, 8) : MOE__TILE_OF(k16, 6);
#endif
}

// What the micro-kernels want of levels of 8 bits: VNNI the offset, AVX2 their signs
MOE__K void MOE__(tile_unpack_iq4_nl)(const uint8_t *rows, size_t stride, int64_t n,
                                      uint8_t *pack) {
    MOE__SHARED(tile_unpack_nibbles)(rows, stride, n, pack, MOE__INDEX_IQ4_NL, !MOE__VNNI);
}
MOE__K void MOE__(tile_unpack_q8_0)(const uint8_t *rows, size_t stride, int64_t n, uint8_t *pack) {
    MOE__SHARED(tile_unpack_bytes)(rows, stride, n, pack, !MOE__VNNI);
}

// moe__tile_fn for any block type
MOE__K void MOE__(tile_blocks)(const moe__type *type, unpack_fn *unpack_row, int order,
                               MOE__SHARED(rows_fn) * unpack_group, const uint8_t *rows,
                               size_t row_size, int64_t n_rows, int64_t n, const void *const *x,
                               int64_t n_tokens, float *out, int64_t out_stride, void *pack,
                               const uint8_t *prefetch, size_t prefetch_size) {
    // What unpacking has added to the levels (see "levels"), and what the micro-kernels want:
    // AVX2 multiplies levels of more than 6 bits with their signs
    const int have = type->bits < 8 || (MOE__ISA == 3 && type->act == MOE__ACT_Q256) ||
                             (MOE__ISA == 3 && type->rows > 1)
                         ? type->offset
                         : 0;
    const int want = MOE__VNNI || type->bits <= 6 ? type->offset : 0;
    tile_plan plan;
    memset(&plan, 0, sizeof plan);
    plan.kernels = MOE__(tile_kernels_of)(type, &plan.step);
    plan.max_tokens = MOE__TILE_TOKENS;
    plan.chains = type->act == MOE__ACT_Q32 ? 4 : 1;
    plan.block = type->block;
    plan.block_bytes = type->bytes;
    plan.record = (int)moe__act_size(type->act, 256);
    for (plan.shift = -1; type->offset >> (plan.shift + 1); plan.shift++) {}
    plan.type = type;
    plan.unpack_row = unpack_row;
    plan.unpack_group = unpack_group;
    plan.order = order;
    plan.add = want - have;
    MOE__SHARED(tile_run)(&plan, rows, row_size, n_rows, n, x, n_tokens, out, out_stride, pack,
                          prefetch, prefetch_size);
}

// What its rows are unpacked by, micro-kernels, chains, log2 of the offset (-1: mins)
#define MOE__TILE_TYPE(NAME, name, unpack, kernels, chains, act, shift)                           \
    MOE__K void MOE__(tile_##name)(const uint8_t *rows, size_t row_size, int64_t n_rows,          \
                                   int64_t n, const void *const *x, int64_t n_tokens, float *out, \
                                   int64_t out_stride, void *pack, const uint8_t *prefetch,       \
                                   size_t prefetch_size) {                                        \
        static const tile_plan plan = {                                                           \
            MOE__TILE_OF kernels, MOE__TILE_TOKENS, unpack, chains, MOE__PER_##NAME,              \
            MOE__BLOCK_##NAME, MOE__BYTES_##NAME, sizeof(act), shift, NULL, NULL, NULL, 0, 0};    \
        MOE__SHARED(tile_run)(&plan, rows, row_size, n_rows, n, x, n_tokens, out, out_stride,     \
                              pack, prefetch, prefetch_size);                                     \
    }
MOE__TILE_TYPE(Q4_0, q4_0, MOE__SHARED(tile_unpack_q4_0), (q32, 4), 4, moe__act32, 3)
MOE__TILE_TYPE(Q5_0, q5_0, MOE__SHARED(tile_unpack_q5_0), (q32, 6), 4, moe__act32, 4)
MOE__TILE_TYPE(IQ4_NL, iq4_nl, MOE__(tile_unpack_iq4_nl), (q32, 8), 4, moe__act32, 7)
MOE__TILE_TYPE(MXFP4, mxfp4, MOE__SHARED(tile_unpack_mxfp4), (q32, 6), 4, moe__act32, 4)
MOE__TILE_TYPE(Q8_0, q8_0, MOE__(tile_unpack_q8_0), (q32, 8), 4, moe__act32, 7)
MOE__TILE_TYPE(Q4_K, q4_k, MOE__SHARED(tile_unpack_q4_k), (k32, 4), 1, moe__act256, -1)
MOE__TILE_TYPE(Q5_K, q5_k, MOE__SHARED(tile_unpack_q5_k), (k32, 6), 1, moe__act256, -1)
MOE__TILE_TYPE(Q6_K, q6_k, MOE__SHARED(tile_unpack_q6_k), (k16, 6), 1, moe__act256, 5)

// Block types without unpacking of their own for tiles, by what they are read with
#define MOE__TILE_BLOCKS(NAME, name, row, order, group)                                           \
    MOE__K void MOE__(tile_##name)(                                                               \
        const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n, const void *const *x,    \
        int64_t n_tokens, float *out, int64_t out_stride, void *pack, const uint8_t *prefetch,    \
        size_t prefetch_size) {                                                                   \
        MOE__(tile_blocks)(&moe__types[MOE__INDEX_##NAME], row, order, group, rows, row_size,     \
                           n_rows, n, x, n_tokens, out, out_stride, pack, prefetch,               \
                           prefetch_size);                                                        \
    }
#define MOE__OF_32(NAME, name, ...) MOE__OF_OTHER_32(NAME, name)
#define MOE__OF_OTHER_32(NAME, name) \
    MOE__TILE_BLOCKS(NAME, name, MOE__AVX2(unpack_##name), MOE__NATURAL, NULL)
#define MOE__OF_256(NAME, name, order, ...) \
    MOE__TILE_BLOCKS(NAME, name, MOE__SHARED(unpack_##name), MOE__##order, NULL)
#define MOE__OF_BOOKS(NAME, name, order, more) MOE__OF_256(NAME, name, order, more)
#define MOE__OF_R4(NAME, name, ...) MOE__OF_OTHER_ROWS(NAME, name)
#define MOE__OF_ROWS_32(NAME, name, ...) MOE__OF_OTHER_ROWS(NAME, name)
#define MOE__OF_OTHER_ROWS(NAME, name) \
    MOE__TILE_BLOCKS(NAME, name, NULL, 0, MOE__SHARED(rows_##name))
#define MOE__TILE_0(NAME) MOE__LAYOUT_##NAME
#define MOE__TILE_1(NAME)
#define MOE__TILE(NAME, name, id, block, bytes, act, rows, meta, per, bits, offset, q, own) \
    MOE__TILE_##own(NAME)
MOE__BLOCK_TYPES(MOE__TILE)
#undef MOE__TILE
#undef MOE__TILE_0
#undef MOE__TILE_1
#undef MOE__TILE_BLOCKS
#undef MOE__OF_32
#undef MOE__OF_256
#undef MOE__OF_BOOKS
#undef MOE__OF_R4
#undef MOE__OF_ROWS_32
#undef MOE__OF_OTHER_32
#undef MOE__OF_OTHER_ROWS

#if MOE__ISA == 2
#define MOE__DEQUANTIZE_1(NAME, name)                                                   \
    MOE__K void MOE__(dequantize_##name)(const uint8_t *rows, int64_t n, float *out) {  \
        MOE__(dequantize_blocks)(&moe__types[MOE__INDEX_##NAME], MOE__(unpack_##name), rows, n, \
                                 out);                                                  \
    }
#define MOE__DEQUANTIZE_4(NAME, name)
#define MOE__DEQUANTIZE_8(NAME, name)
#define MOE__DEQUANTIZE(NAME, name, id, block, bytes, act, rows, ...) \
    MOE__DEQUANTIZE_##rows(NAME, name)
MOE__BLOCK_TYPES(MOE__DEQUANTIZE)
#undef MOE__DEQUANTIZE
#undef MOE__DEQUANTIZE_1
#undef MOE__DEQUANTIZE_4
#undef MOE__DEQUANTIZE_8
#endif
#undef MOE__TILE_TOKENS
#undef MOE__PANEL
#undef MOE__EACH_TOKEN
#undef MOE__TILE_KERNEL
#undef MOE__TILE_KERNELS
#undef MOE__TILE_OF
#undef MOE__TILE_TYPE

#if MOE__ISA != 4 // AVX-VNNI has these from AVX2

// ---- floats: norms, activations, softmax, attention ------------------------------------------

// MOE__VD is a vector of half as many doubles as MOE__VF has floats. A "part" is a ragged end of
// n = 1..MOE__VFLOATS elements: nothing beyond it is touched, the other lanes read 0.
#if MOE__ISA == 2
#define MOE__VD __m256d
#define MOE__VD_OP(name) _mm256_##name##_pd

static const int32_t MOE__(part_mask)[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

MOE__V __m256i f_mask(int64_t n) {
    return _mm256_loadu_si256((const __m256i *)(const void *)(MOE__(part_mask) + 8 - n));
}
MOE__V __m256 f_load_part(const float *p, int64_t n) { return _mm256_maskload_ps(p, f_mask(n)); }
MOE__V void f_store_part(float *p, int64_t n, __m256 x) { _mm256_maskstore_ps(p, f_mask(n), x); }
// x in the first n lanes, y in the others.
MOE__V __m256 f_select_part(int64_t n, __m256 x, __m256 y) {
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(f_mask(n)));
}
MOE__V __m256 f_load_half(const void *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
// At most 3 halves from p, in the low bits.
MOE__V uint64_t MOE__(load_3_halves)(const uint8_t *p, int64_t n) {
    uint64_t bits = 0;
    if (n & 2) bits = moe__load_u32(p);
    if (n & 1) bits |= (uint64_t)moe__load_u16(p + 2 * (n & 2)) << 16 * (n & 2);
    return bits;
}
MOE__V __m256 f_load_half_part(const void *memory, int64_t n) {
    const uint8_t *p = (const uint8_t *)memory;
    if (n == 8) return f_load_half(p);
    uint64_t low, high = 0;
    if (n < 4) {
        low = MOE__(load_3_halves)(p, n);
    } else {
        low = moe__load_u64(p);
        high = MOE__(load_3_halves)(p + 8, n - 4);
    }
    return _mm256_cvtph_ps(_mm_set_epi64x((int64_t)high, (int64_t)low));
}
MOE__V __m128i f_to_half(__m256 x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MOE__V void f_store_half(uint16_t *p, __m256 x) {
    _mm_storeu_si128((__m128i *)(void *)p, f_to_half(x));
}
MOE__V void f_store_half_part(uint16_t *p, int64_t n, __m256 x) {
    uint16_t halves[8];
    f_store_half(halves, x);
    for (int64_t i = 0; i < n; i++) p[i] = halves[i];
}
MOE__V __m256 f_load_i8(const void *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
// Rounded to the nearest even.
MOE__V void f_store_i8(uint8_t *p, __m256 x) {
    const __m256i whole = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                    _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi16(words, words));
}
// One half from p in every lane.
MOE__V __m256 f_set_half(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_set1_epi16((short)moe__load_u16(p)));
}
MOE__V __m256 f_round(__m256 x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2^n for whole n in -252..254, in two steps so that neither factor leaves the normal range.
MOE__V __m256 f_scale(__m256 x, __m256 n) {
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    __m256i rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
    __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    __m256i b = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}
MOE__V __m256d f_low(__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
MOE__V __m256d f_high(__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
MOE__V float f_first(__m256 x) { return _mm_cvtss_f32(_mm256_castps256_ps128(x)); }
// x where it is least or more, -inf elsewhere.
MOE__V __m256 f_at_least(__m256 x, __m256 least) {
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, _mm256_cmp_ps(x, least, _CMP_GE_OQ));
}
// y where x is above low, 0 elsewhere.
MOE__V __m256d d_above(__m256d x, __m256d low, __m256d y) {
    return _mm256_and_pd(_mm256_cmp_pd(x, low, _CMP_GT_OQ), y);
}
// y * 2^n, n being the low bits of x's mantissa.
MOE__V __m256d d_scale(__m256d y, __m256d x) {
    const __m256i n = _mm256_slli_epi64(_mm256_castpd_si256(x), 52);
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(y), n));
}
MOE__V __m256 f_fold(__m256 x) { return x; }
MOE__V __m256 f_fold_max(__m256 x) { return x; }
MOE__V __m256d d_fold(__m256d x) { return x; }

#else
#define MOE__VD __m512d
#define MOE__VD_OP(name) _mm512_##name##_pd

MOE__V __mmask16 f_mask(int64_t n) { return (__mmask16)((1u << n) - 1); }
MOE__V __m512 f_load_part(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(f_mask(n), p); }
MOE__V void f_store_part(float *p, int64_t n, __m512 x) { _mm512_mask_storeu_ps(p, f_mask(n), x); }
// x in the first n lanes, y in the others.
MOE__V __m512 f_select_part(int64_t n, __m512 x, __m512 y) {
    return _mm512_mask_blend_ps(f_mask(n), y, x);
}
MOE__V __m512 f_load_half(const void *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
MOE__V __m512 f_load_half_part(const void *p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(f_mask(n), p));
}
MOE__V __m256i f_to_half(__m512 x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MOE__V void f_store_half(uint16_t *p, __m512 x) {
    _mm256_storeu_si256((__m256i *)(void *)p, f_to_half(x));
}
MOE__V void f_store_half_part(uint16_t *p, int64_t n, __m512 x) {
    _mm256_mask_storeu_epi16(p, f_mask(n), f_to_half(x));
}
MOE__V __m512 f_load_i8(const void *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
MOE__V void f_store_i8(uint8_t *p, __m512 x) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
MOE__V __m512 f_set_half(const uint8_t *p) {
    return _mm512_cvtph_ps(u_set16((short)moe__load_u16(p)));
}
MOE__V __m512 f_round(__m512 x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MOE__V __m512 f_scale(__m512 x, __m512 n) { return _mm512_scalef_ps(x, n); }
MOE__V __m256 f_upper(__m512 x) { return _mm512_extractf32x8_ps(x, 1); }
MOE__V __m512d f_low(__m512 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
MOE__V __m512d f_high(__m512 x) { return _mm512_cvtps_pd(f_upper(x)); }
MOE__V float f_first(__m512 x) { return _mm_cvtss_f32(_mm512_castps512_ps128(x)); }
// x where it is least or more, -inf elsewhere.
MOE__V __m512 f_at_least(__m512 x, __m512 least) {
    const __mmask16 mask = _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ);
    return _mm512_mask_blend_ps(mask, _mm512_set1_ps(-INFINITY), x);
}
// y where x is above low, 0 elsewhere.
MOE__V __m512d d_above(__m512d x, __m512d low, __m512d y) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x, low, _CMP_GT_OQ), y);
}
// y * 2^n, n being the low bits of x's mantissa.
MOE__V __m512d d_scale(__m512d y, __m512d x) {
    const __m512i n = _mm512_slli_epi64(_mm512_castpd_si512(x), 52);
    return _mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(y), n));
}
// 512 bits to 256: the first step of a reduction.
MOE__V __m256 f_fold(__m512 x) { return _mm256_add_ps(_mm512_castps512_ps256(x), f_upper(x)); }
MOE__V __m256 f_fold_max(__m512 x) { return _mm256_max_ps(_mm512_castps512_ps256(x), f_upper(x)); }
MOE__V __m256d d_fold(__m512d x) {
    return _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
}
#endif

MOE__V MOE__VD d_zero(void) { return MOE__VD_OP(setzero)(); }
MOE__V MOE__VD d_add(MOE__VD a, MOE__VD b) { return MOE__VD_OP(add)(a, b); }
MOE__V MOE__VD d_square_add(MOE__VD a, MOE__VD c) { return MOE__VD_OP(fmadd)(a, a, c); }

MOE__V float f_sum(MOE__VF x) {
    __m256 half = f_fold(x);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
MOE__V float f_largest(MOE__VF x) {
    __m256 half = f_fold_max(x);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
MOE__V double d_sum(MOE__VD x) {
    __m256d half = d_fold(x);
    __m128d q = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
    return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
}
// The sums of four vectors, side by side: within lanes first, so that one vector holds the sums
// of all four from then on.
MOE__V __m128 f_sum4(MOE__VF a, MOE__VF b, MOE__VF c, MOE__VF d) {
    const MOE__VF ab = f_add(MOE__MM(unpacklo_ps)(a, b), MOE__MM(unpackhi_ps)(a, b));
    const MOE__VF cd = f_add(MOE__MM(unpacklo_ps)(c, d), MOE__MM(unpackhi_ps)(c, d));
    const __m256 all =
        f_fold(f_add(MOE__MM(shuffle_ps)(ab, cd, 0x44), MOE__MM(shuffle_ps)(ab, cd, 0xEE)));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// e^x within 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, e^x = 2^n e^r, e^r = 1 + r + r^2 p(r),
// where p is the minimax polynomial of degree 4 (Remez; 4e-9 of e^r). Beyond the bounds the
// result is 0 or infinity anyhow; NaN stays NaN, e^0 is 1.
MOE__V MOE__VF f_exp(MOE__VF x) {
    x = f_max(f_set(-104.0f), x);
    x = f_min(f_set(89.0f), x);
    MOE__VF n = f_round(f_mul(x, f_set(1.44269504f)));
    MOE__VF r = f_fnma(n, f_set(0.693147182f), x); // ln 2 as float, exact by fma
    r = f_fnma(n, f_set(-1.90465421e-9f), r);     // ln 2 minus that
    MOE__VF p = f_set(1.38145988e-3f);
    p = f_fma(p, r, f_set(8.36871658e-3f));
    p = f_fma(p, r, f_set(4.16683889e-2f));
    p = f_fma(p, r, f_set(1.66665211e-1f));
    p = f_fma(p, r, f_set(4.99999940e-1f));
    MOE__VF e = f_fma(f_mul(r, r), p, r);
    return f_scale(f_add(e, f_set(1.0f)), n);
}

// Squares are summed in double: rows have up to 7168 values, and a square may leave the range.
MOE__K void MOE__(rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *out) {
    MOE__VD s0 = d_zero(), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 2 * MOE__VFLOATS <= n; i += 2 * MOE__VFLOATS) {
        MOE__VF a = f_load(x + i), b = f_load(x + i + MOE__VFLOATS);
        s0 = d_square_add(f_low(a), s0);
        s1 = d_square_add(f_high(a), s1);
        s2 = d_square_add(f_low(b), s2);
        s3 = d_square_add(f_high(b), s3);
    }
    for (; i < n; i += MOE__VFLOATS) {
        MOE__VF a = f_load_part(x + i, moe__min(n - i, MOE__VFLOATS));
        s0 = d_square_add(f_low(a), s0);
        s1 = d_square_add(f_high(a), s1);
    }
    double sum = d_sum(d_add(d_add(s0, s1), d_add(s2, s3)));
    __m128d root = _mm_sqrt_pd(_mm_set1_pd(sum / (double)n + (double)eps));
    MOE__VF scale = f_set((float)(1.0 / _mm_cvtsd_f64(root)));
    for (i = 0; i + MOE__VFLOATS <= n; i += MOE__VFLOATS) {
        MOE__VF a = f_mul(f_load(x + i), scale);
        if (weight) a = f_mul(a, f_load(weight + i));
        f_store(out + i, a);
    }
    if (i == n) return;
    MOE__VF a = f_mul(f_load_part(x + i, n - i), scale);
    if (weight) a = f_mul(a, f_load_part(weight + i, n - i));
    f_store_part(out + i, n - i, a);
}

// The first n floats at p, or a whole vector if there are as many.
MOE__V MOE__VF f_load_n(const float *p, int64_t n) {
    return n >= MOE__VFLOATS ? f_load(p) : f_load_part(p, n);
}
MOE__V void f_store_n(float *p, int64_t n, MOE__VF x) {
    if (n >= MOE__VFLOATS)
        f_store(p, x);
    else
        f_store_part(p, n, x);
}

// x / (1 + e^-gate)
MOE__V MOE__VF f_gate(MOE__VF x, MOE__VF gate) {
    return f_div(x, f_add(f_set(1.0f), f_exp(f_mul(f_set(-1.0f), gate))));
}
// ln(1 + e^x) within 3 ulp: the positive part of x, plus ln(1 + z) with z = e^-|x|. That is
// 2 atanh(t / 2) with t = 2 z / (2 + z) <= 2 / 3, whose series t + t^3 / 12 + t^5 / 80 + ... has
// the relative accuracy of t, however small; here t + t^3 p(t^2), p minimax (Remez; 5e-9).
MOE__V MOE__VF f_softplus(MOE__VF x) {
    const MOE__VF z = f_exp(f_min(x, f_sub(f_zero(), x))); // NaN stays NaN, here and below
    const MOE__VF t = f_div(f_add(z, z), f_add(f_set(2.0f), z)), square = f_mul(t, t);
    MOE__VF p = f_set(5.47109114e-4f);
    p = f_fma(p, square, f_set(2.1876411e-3f));
    p = f_fma(p, square, f_set(1.25067271e-2f));
    p = f_fma(p, square, f_set(8.33330229e-2f));
    return f_add(f_max(f_zero(), x), f_fma(f_mul(square, t), p, t));
}

// gate / (1 + exp(-gate)) * up, or as gpt-oss has it; oai is a constant once inlined.
MOE__V MOE__VF f_glu(MOE__VF gate, MOE__VF up, const int oai) {
    if (!oai) return f_mul(f_gate(gate, gate), up);
    const MOE__VF most = f_set(7.0f);
    gate = f_min(most, gate);
    up = f_max(f_set(-7.0f), f_min(most, up));
    return f_mul(f_gate(gate, f_mul(f_set(1.702f), gate)), f_add(up, f_set(1.0f)));
}
MOE__V void MOE__(glu)(const float *gate, const float *up, int64_t n, float *out, const int oai) {
    int64_t i = 0;
    for (; i + MOE__VFLOATS <= n; i += MOE__VFLOATS)
        f_store(out + i, f_glu(f_load(gate + i), f_load(up + i), oai));
    if (i == n) return;
    MOE__VF g = f_load_part(gate + i, n - i), u = f_load_part(up + i, n - i);
    f_store_part(out + i, n - i, f_glu(g, u, oai));
}
MOE__K void MOE__(swiglu)(const float *gate, const float *up, int64_t n, float *out) {
    MOE__(glu)(gate, up, n, out, 0);
}
MOE__K void MOE__(swiglu_oai)(const float *gate, const float *up, int64_t n, float *out) {
    MOE__(glu)(gate, up, n, out, 1);
}

MOE__K void MOE__(gate)(float *x, const float *gate, int64_t n) {
    for (int64_t i = 0; i < n; i += MOE__VFLOATS)
        f_store_n(x + i, n - i, f_gate(f_load_n(x + i, n - i), f_load_n(gate + i, n - i)));
}
MOE__K void MOE__(softplus)(const float *x, const float *bias, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += MOE__VFLOATS) {
        const MOE__VF sum = f_add(f_load_n(x + i, n - i), f_load_n(bias + i, n - i));
        f_store_n(out + i, n - i, f_softplus(sum));
    }
}
MOE__K void MOE__(decay)(const float *x, const float *bias, int64_t n, float a, float low,
                         float *out) {
    for (int64_t i = 0; i < n; i += MOE__VFLOATS) {
        const MOE__VF sum = f_add(f_load_n(x + i, n - i), f_load_n(bias + i, n - i));
        const MOE__VF y = low < 0 ? f_gate(f_set(low), f_mul(f_set(a), sum))
                                  : f_mul(f_set(a), f_softplus(sum));
        f_store_n(out + i, n - i, f_exp(y));
    }
}
MOE__K void MOE__(relu_squared)(const float *up, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += MOE__VFLOATS) {
        const MOE__VF x = f_max(f_zero(), f_load_n(up + i, n - i));
        f_store_n(out + i, n - i, f_mul(x, x));
    }
}
MOE__K void MOE__(swiglu_limited)(const float *gate, const float *up, int64_t n, float limit,
                                  float *out) {
    const MOE__VF most = f_set(limit), least = f_set(-limit);
    for (int64_t i = 0; i < n; i += MOE__VFLOATS) {
        const MOE__VF g = f_load_n(gate + i, n - i), u = f_load_n(up + i, n - i);
        const MOE__VF x = f_min(most, f_gate(g, g));
        f_store_n(out + i, n - i, f_mul(x, f_max(least, f_min(most, u))));
    }
}

// NaN never becomes the maximum: it turns the sum, and with it every output, into NaN.
MOE__K void MOE__(softmax)(float *x, int64_t n) {
    const int64_t full = n / MOE__VFLOATS * MOE__VFLOATS, rest = n - full;
    MOE__VF lowest = f_set(-INFINITY), m = lowest;
    for (int64_t i = 0; i < full; i += MOE__VFLOATS) m = f_max(f_load(x + i), m);
    MOE__VF end = lowest; // lanes beyond n: e^-inf = 0 adds nothing
    if (rest) end = f_select_part(rest, f_load_part(x + full, rest), lowest);
    m = f_set(f_largest(f_max(end, m)));
    MOE__VD s0 = d_zero(), s1 = s0; // double: n may be a vocabulary
    for (int64_t i = 0; i < full; i += MOE__VFLOATS) {
        MOE__VF e = f_exp(f_sub(f_load(x + i), m));
        f_store(x + i, e);
        s0 = d_add(f_low(e), s0);
        s1 = d_add(f_high(e), s1);
    }
    if (rest) {
        end = f_exp(f_sub(end, m));
        s0 = d_add(f_low(end), s0);
        s1 = d_add(f_high(end), s1);
    }
    MOE__VF sum = f_set((float)d_sum(d_add(s0, s1)));
    for (int64_t i = 0; i < full; i += MOE__VFLOATS) f_store(x + i, f_div(f_load(x + i), sum));
    if (rest) f_store_part(x + full, rest, f_div(end, sum));
}

// Weights, as moe__weigh_scalar and moe__weigh_power have them. GCC would fuse products and sums
// of intrinsics, too.
typedef struct MOE__(weights) {
    MOE__VF least;
    MOE__VD max, factor;
} MOE__(weights);

MOE__V MOE__VD d_set(double x) { return MOE__VD_OP(set1)(x); }
MOE__V MOE__VD d_sub(MOE__VD a, MOE__VD b) { return MOE__VD_OP(sub)(a, b); }
MOE__V MOE__VD d_product(MOE__VD a, MOE__VD b) {
    MOE__VD x = MOE__VD_OP(mul)(a, b);
    __asm__("" : "+v"(x));
    return x;
}
// p * r + c, rounded twice.
MOE__V MOE__VD d_step(MOE__VD p, MOE__VD r, double c) { return d_add(d_product(p, r), d_set(c)); }
MOE__V MOE__VD d_weigh(MOE__VD x, const MOE__(weights) *w) {
    const MOE__VD shift = d_set(6755399441055744.0);
    const MOE__VD t = d_product(d_sub(x, w->max), w->factor);
    const MOE__VD shifted = d_add(t, shift);
    const MOE__VD r = d_sub(t, d_sub(shifted, shift));
    MOE__VD p = d_step(d_set(1.3344144332419254e-06), r, 1.5314206034731837e-05);
    p = d_step(p, r, 0.00015403098456626539);
    p = d_step(p, r, 0.0013333434171244902);
    p = d_step(p, r, 0.0096181295586266428);
    p = d_step(p, r, 0.055504109592126163);
    p = d_step(p, r, 0.24022650694743239);
    p = d_step(p, r, 0.69314718054123725);
    p = d_step(p, r, 1.0);
    return d_above(t, d_set(-1000.0), d_scale(p, shifted));
}
// One vector of floats: two of weights, added to their sums.
MOE__V void MOE__(weigh_step)(MOE__VF x, const MOE__(weights) *w, MOE__VD *sum, double *e) {
    x = f_at_least(x, w->least);
    const MOE__VD low = d_weigh(f_low(x), w);
    const MOE__VD high = d_weigh(f_high(x), w);
    sum[0] = d_add(sum[0], low);
    sum[1] = d_add(sum[1], high);
    if (!e) return;
    MOE__VD_OP(storeu)(e, low);
    MOE__VD_OP(storeu)(e + MOE__VFLOATS / 2, high);
}
MOE__K double MOE__(weigh)(const float *x, int64_t n, float least, double max, double scale,
                           double *e) {
    enum { SUMS = 32 / MOE__VFLOATS };
    const MOE__(weights) w = {f_set(least), d_set(max), d_set(scale * 1.4426950408889634)};
    MOE__VD sum[SUMS];
    double lanes[16];
    MOE__UNROLL(4)
    for (int s = 0; s < SUMS; s++) sum[s] = d_zero();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        MOE__UNROLL(2)
        for (int s = 0; s < SUMS; s += 2)
            MOE__(weigh_step)
            (f_load(x + i + s * (MOE__VFLOATS / 2)), &w, sum + s,
             e ? e + i + s * (MOE__VFLOATS / 2) : NULL);
    }
    if (i < n) {
        const MOE__VF nothing = f_set(-INFINITY);
        MOE__UNROLL(2)
        for (int s = 0; s < SUMS; s += 2, i += MOE__VFLOATS) {
            const int64_t rest = moe__max(0, moe__min(n - i, MOE__VFLOATS));
            MOE__VF end = nothing;
            if (rest) end = f_select_part(rest, f_load_part(x + i, rest), nothing);
            MOE__(weigh_step)(end, &w, sum + s, e ? e + i : NULL);
        }
    }
    MOE__UNROLL(4)
    for (int s = 0; s < SUMS; s++)
        MOE__VD_OP(storeu)(lanes + s * (MOE__VFLOATS / 2), sum[s]);
    return moe__weigh_sum(lanes);
}

MOE__K void MOE__(peaks)(const float *x, int64_t n, float *out) {
    const MOE__VF lowest = f_set(-INFINITY);
    for (; n >= MOE__PEAK; n -= MOE__PEAK, x += MOE__PEAK) {
        MOE__VF a = lowest, b = lowest;
        MOE__UNROLL(8)
        for (int i = 0; i < MOE__PEAK; i += 2 * MOE__VFLOATS) {
            a = f_max(f_load(x + i), a);
            b = f_max(f_load(x + i + MOE__VFLOATS), b);
        }
        *out++ = f_largest(f_max(a, b));
    }
    if (n == 0) return;
    MOE__VF a = lowest;
    for (int64_t i = 0; i < n; i += MOE__VFLOATS) {
        const int64_t rest = moe__min(n - i, MOE__VFLOATS);
        a = f_max(f_select_part(rest, f_load_part(x + i, rest), lowest), a);
    }
    *out = f_largest(a);
}

MOE__K void MOE__(axpy)(float a, const float *x, int64_t n, float *y) {
    MOE__VF factor = f_set(a);
    int64_t i = 0;
    for (; i + MOE__VFLOATS <= n; i += MOE__VFLOATS)
        f_store(y + i, f_fma(factor, f_load(x + i), f_load(y + i)));
    if (i == n) return;
    MOE__VF b = f_load_part(x + i, n - i), c = f_load_part(y + i, n - i);
    f_store_part(y + i, n - i, f_fma(factor, b, c));
}

MOE__K void MOE__(divide)(float *x, int64_t n, float by) {
    const MOE__VF d = f_set(by);
    int64_t i = 0;
    for (; i + MOE__VFLOATS <= n; i += MOE__VFLOATS)
        f_store(x + i, MOE__MM(div_ps)(f_load(x + i), d));
    for (; i < n; i++) x[i] /= by;
}

MOE__K void MOE__(f32_to_f16)(const float *x, int64_t n, uint16_t *out) {
    int64_t i = 0;
    for (; i + MOE__VFLOATS <= n; i += MOE__VFLOATS) f_store_half(out + i, f_load(x + i));
    if (i < n) f_store_half_part(out + i, n - i, f_load_part(x + i, n - i));
}

MOE__K void MOE__(f32_to_q8_0)(const float *x, int64_t n, uint8_t *out) {
    const MOE__VF limit = f_set(127.0f), low = f_set(-127.0f);
    for (; n > 0; n -= 32, x += 32, out += 34) {
        MOE__VF high = f_zero(), finite = high; // or NaN
        for (int i = 0; i < 32; i += MOE__VFLOATS) {
            const MOE__VF v = f_load(x + i);
            high = f_max(f_max(v, f_sub(f_zero(), v)), high);
            finite = f_fma(f_zero(), v, finite);
        }
        const float inverse = moe__q8_0_scale(f_largest(high) + f_sum(finite), out);
        for (int i = 0; i < 32; i += MOE__VFLOATS) {
            MOE__VF v = inverse > 0 ? f_mul(f_load(x + i), f_set(inverse)) : f_zero();
            f_store_i8(out + 2 + i, f_max(low, f_min(limit, v)));
        }
    }
}

// ---- attention -------------------------------------------------------------------------------

// Three passes over each chunk: scores = Q K^T, exponentials, P V, which is added to the state
// as it leaves the registers. Both products work on register tiles of up to MOE__ATTEND_ROWS
// queries by 4 keys, or by 4 vectors of the values:
//
//     scores    lanes run over dk; one accumulator per (query, key), summed across at the end
//     values    lanes run over dv; one accumulator per (query, vector), keys in order
//
// Of Q8_0 values only the int8 are made floats: their scales go into the weights, which takes
// one multiplication for a block instead of one for each of its vectors. As every tile converts
// for itself, tiles of many queries are up to MOE__ATTEND_WIDE queries by 2 vectors.
//
// Memory is read all the time: while scores are computed, the chunk's values are fetched, and
// meanwhile the next chunk's keys. Where values are part of the keys, half of those each time.
//
// However the queries are grouped, one query goes through the same operations in the same order:
// its result does not depend on the queries that share the call. A key that a query does not see
// is left out, not multiplied by zero: its value may be NaN.
#if MOE__ISA == 2
#define MOE__ATTEND_ROWS 3 // 12 accumulators, 3 queries and 1 key fill the 16 registers
#define MOE__ATTEND_WIDE 4 // 8 accumulators: with 12, clang has no registers to convert in
#define MOE__ATTEND_FEW 2  // most queries of a Q8_0 tile that is 4 vectors wide
#else
#define MOE__ATTEND_ROWS 4 // 16 accumulators: one load for two multiplications
#define MOE__ATTEND_WIDE 8
#define MOE__ATTEND_FEW 4
#endif

enum {
    MOE__(ATTEND_DK) = 1024, // longest key that is converted ahead of its tiles
    ATTEND_STEP = 64, // keys that are prepared at a time, if they are for many queries
    MOE__(ATTEND_TOGETHER) = MOE__ATTEND_QUERIES / 2, // most queries that are not many
    MOE__(ATTEND_FIRST) = 16384, // bytes of a call's first keys that are fetched at once
    MOE__(ATTEND_BLOCKS) = 4 * MOE__VFLOATS / 32, // Q8_0 blocks in 4 vectors
    // Weights of a column of Q8_0 blocks
    MOE__(ATTEND_SCALED) = MOE__(ATTEND_TOGETHER) *MOE__(ATTEND_BLOCKS) * (int)MOE__ATTEND_KEYS,
    // From this many tiles per row on, f16 is converted to floats once for all of them. Below,
    // each tile converts for itself: with 2 tiles that gave 79 % of the FMA peak on a Zen 4,
    // against 66 % with floats stored and loaded again.
    MOE__(ATTEND_CONVERT) = 5
};

// A vector of a Q8_0 block from its value i on.
MOE__V MOE__VF MOE__(q8_0_load)(const uint8_t *block, int64_t i) {
    return f_mul(f_load_i8(block + 2 + i), f_set_half(block));
}
MOE__V MOE__VF kv_load(const uint8_t *row, int64_t i, moe_kv_type type) {
    const uint8_t *p = row + moe__kv_bytes(type, i);
    if (type == MOE_KV_Q8_0) return MOE__(q8_0_load)(p, i % 32);
    return type == MOE_KV_F32 ? f_load(p) : f_load_half(p);
}
// Not for Q8_0, whose rows are whole vectors.
MOE__V MOE__VF kv_load_part(const uint8_t *row, int64_t i, int64_t n, moe_kv_type type) {
    const uint8_t *p = row + moe__kv_bytes(type, i);
    if (type == MOE_KV_F32) return f_load_part((const float *)(const void *)p, n);
    return f_load_half_part(p, n);
}
// n values of a row, not f32, to floats. f16: the last vector is filled up with zeros.
MOE__V void MOE__(kv_to_floats)(const uint8_t *row, moe_kv_type type, int64_t n, float *out) {
    int64_t i = 0;
    if (type == MOE_KV_Q8_0)
        for (; i < n; i += 32, row += 34)
            MOE__UNROLL(4)
            for (int c = 0; c < 32; c += MOE__VFLOATS)
                f_store(out + i + c, MOE__(q8_0_load)(row, c));
    for (; i + MOE__VFLOATS <= n; i += MOE__VFLOATS) f_store(out + i, kv_load(row, i, MOE_KV_F16));
    if (i < n) f_store(out + i, kv_load_part(row, i, n - i, MOE_KV_F16));
}
// The scales of n blocks that lie row_bytes apart. Four per store: one each would take longer
// than all else that is done to a block before it is multiplied.
MOE__V void MOE__(q8_0_scales)(const uint8_t *block, size_t row_bytes, int n, uint16_t *out) {
    int j = 0;
    for (; j + 16 <= n; j += 16)
        MOE__UNROLL(4)
        for (int i = 0; i < 16; i += 4, block += 4 * row_bytes) {
            const uint64_t x = (uint64_t)moe__load_u16(block) |
                               (uint64_t)moe__load_u16(block + row_bytes) << 16 |
                               (uint64_t)moe__load_u16(block + 2 * row_bytes) << 32 |
                               (uint64_t)moe__load_u16(block + 3 * row_bytes) << 48;
            memcpy(out + j + i, &x, sizeof x);
        }
    for (; j < n; j++, block += row_bytes) out[j] = moe__load_u16(block);
}

// How many queries to take at a time, at most `most`, so that the tiles are even.
MOE__V int attend_rows(int n_queries, int most) {
    int tiles = (n_queries + most - 1) / most;
    return (n_queries + tiles - 1) / tiles;
}
// The largest of n numbers of visible keys.
MOE__V int attend_most(const int32_t *visible, int n) {
    int most = 0;
    for (int i = 0; i < n; i++) most = visible[i] > most ? visible[i] : most;
    return most;
}

// The smallest of n first keys.
MOE__V int attend_least(const int32_t *first, int n) {
    int least = first[0];
    for (int i = 1; i < n; i++) least = first[i] < least ? first[i] : least;
    return least;
}

// What is read next: `at` to `end`, then `then` to `then_end`. It is fetched in portions, as
// large as what is being computed: all of it at once would only queue up.
typedef struct attend_stream {
    const char *at, *end, *then, *then_end;
} attend_stream;

MOE__V void fetch_stream(attend_stream *s, int64_t bytes) {
    if (s->at >= s->end) {
        if (s->then >= s->then_end) return;
        s->at = s->then;
        s->end = s->then = s->then_end;
    }
    const char *line = s->at + (0 - (uintptr_t)s->at) % 64; // another began before the portion
    s->at += bytes;
    for (; line < s->at; line += 64) fetch_line(line);
}

// What a call sees of a chunk
typedef struct attend_chunk {
    const uint8_t *k, *v;       // its first key and value
    int start, n_keys;          // a multiple of ATTEND_STEP; up to the last that is seen
    int32_t first[MOE__ATTEND_QUERIES], visible[MOE__ATTEND_QUERIES]; // a query that sees
                                // nothing: MOE__ATTEND_KEYS, 0
    float max[MOE__ATTEND_QUERIES], sum[MOE__ATTEND_QUERIES]; // its own state
    float add[MOE__ATTEND_QUERIES], old[MOE__ATTEND_QUERIES]; // out = add * sums + old * out
    attend_stream stream; // fetched while scores are computed,
    const uint8_t *ahead;        // and then: so many rows, such a part of each row
    int64_t ahead_rows, ahead_bytes;
} attend_chunk;

// The chunk at this key: what is seen of it. Returns whether anything is.
MOE__V int MOE__(attend_chunk_at)(const moe__attend_args *a, int key, attend_chunk *c) {
    c->start = MOE__ATTEND_KEYS;
    c->n_keys = 0;
    c->k = (const uint8_t *)a->k + (size_t)key * a->k_bytes;
    c->v = (const uint8_t *)a->v + (size_t)key * a->v_bytes;
    for (int i = 0; i < a->n_queries; i++) {
        const int n = (a->n_visible ? a->n_visible[i] : a->n_keys) - key;
        const int from = (a->first ? a->first[i] : 0) - key;
        c->first[i] = from < 0 ? 0 : from;
        c->visible[i] = n < MOE__ATTEND_KEYS ? n : MOE__ATTEND_KEYS;
        if (c->first[i] < c->visible[i]) {
            if (c->visible[i] > c->n_keys) c->n_keys = c->visible[i];
            if (c->first[i] < c->start) c->start = c->first[i];
            continue;
        }
        c->first[i] = MOE__ATTEND_KEYS;
        c->visible[i] = 0;
    }
    c->start = c->start / ATTEND_STEP * ATTEND_STEP;
    return c->n_keys > 0;
}

// What is fetched meanwhile; next: keys that are seen behind this chunk; begins: whether nobody
// fetched this chunk's keys.
MOE__V void MOE__(attend_ahead)(const moe__attend_args *a, attend_chunk *c, int next, int begins) {
    attend_stream *s = &c->stream;
    const int apart = a->v != a->k, rows = next < MOE__ATTEND_KEYS ? next : MOE__ATTEND_KEYS;
    const int half = apart ? 0 : rows / 2;
    const uint8_t *keys = c->k + MOE__ATTEND_KEYS * a->k_bytes;
    const uint8_t *then = apart ? c->v + (size_t)c->start * a->v_bytes : keys;
    const int64_t n = apart ? c->n_keys - c->start : half;
    s->then = (const char *)then;
    s->then_end = s->then + n * (int64_t)(apart ? a->v_bytes : a->k_bytes);
    s->at = s->end = s->then_end;
    if (begins) {
        s->at = (const char *)c->k + (size_t)c->start * a->k_bytes;
        s->end = (const char *)c->k + (size_t)c->n_keys * a->k_bytes;
        fetch_stream(s, moe__min(MOE__(ATTEND_FIRST), s->end - s->at));
    }
    c->ahead = keys + (size_t)half * a->k_bytes;
    c->ahead_rows = rows - half;
    c->ahead_bytes = (int64_t)a->k_bytes;
}

// Bytes of each of so many portions.
MOE__V int64_t MOE__(attend_due)(const attend_chunk *c, int64_t portions) {
    const attend_stream *s = &c->stream;
    return ((s->end - s->at) + (s->then_end - s->then)) / portions + 1;
}

// In all tiles n, type and columns are constants once inlined. All loops run over the largest
// tile with a condition on n: unrolled completely, they keep the accumulators in registers, and
// clang needs exact counts for that.
typedef struct score_args {
    const float *q; // of the tile's first query
    int64_t q_stride;
    const uint8_t *key; // the first of n_keys, 1..4
    size_t k_bytes;
    int32_t n_keys, dk;
    float *scores; // 4 floats per query are written, MOE__ATTEND_KEYS apart
} score_args;

MOE__V void score_tile(const int n, const moe_kv_type type, const score_args *t) {
    MOE__VF acc[MOE__ATTEND_ROWS][4], x[MOE__ATTEND_ROWS];
    const uint8_t *key[4];
    MOE__UNROLL(4)
    for (int c = 0; c < 4; c++) {
        key[c] = t->key + t->k_bytes * (size_t)(c < t->n_keys ? c : 0);
        MOE__UNROLL(MOE__ATTEND_ROWS)
        for (int r = 0; r < MOE__ATTEND_ROWS; r++) acc[r][c] = f_zero();
    }
    const int64_t dk = t->dk;
    int64_t i = 0;
    const int step = type == MOE_KV_Q8_0 ? 32 : MOE__VFLOATS;
    size_t at = 0;
    for (; i + step <= dk; i += step, at += moe__kv_bytes(type, step))
        MOE__UNROLL(4)
        for (int s = 0; s < step; s += MOE__VFLOATS) {
            MOE__UNROLL(MOE__ATTEND_ROWS)
            for (int r = 0; r < MOE__ATTEND_ROWS; r++)
                if (r < n) x[r] = f_load(t->q + r * t->q_stride + i + s);
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++) {
                MOE__VF k = f_keep(kv_load(key[c] + at, s, type));
                MOE__UNROLL(MOE__ATTEND_ROWS)
                for (int r = 0; r < MOE__ATTEND_ROWS; r++)
                    if (r < n) acc[r][c] = f_fma(x[r], k, acc[r][c]);
            }
        }
    if (n == 1 && i < dk) { // ragged rows come one query at a time
        MOE__VF y = f_load_part(t->q + i, dk - i);
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++)
            acc[0][c] = f_fma(y, kv_load_part(key[c], i, dk - i, type), acc[0][c]);
    }
    MOE__UNROLL(MOE__ATTEND_ROWS)
    for (int r = 0; r < MOE__ATTEND_ROWS; r++)
        if (r < n)
            _mm_storeu_ps(t->scores + r * MOE__ATTEND_KEYS,
                          f_sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
}

// One function for each n, [n - 1], and type; Q8_0 has blocks of keys instead with 512 bits.
#define MOE__SCORE_TILE(n, name, type)                                            \
    MOE__K void MOE__(score_##name##_##n)(const score_args *t) { score_tile(n, type, t); }
#define MOE__SCORE_TILES(n)                   \
    MOE__SCORE_TILE(n, f32, MOE_KV_F32)       \
    MOE__SCORE_TILE(n, f16, MOE_KV_F16)
MOE__SCORE_TILES(1)
MOE__SCORE_TILES(2)
MOE__SCORE_TILES(3)
typedef void MOE__(score_fn)(const score_args *t);
#if MOE__ISA == 3
MOE__SCORE_TILES(4)
static MOE__(score_fn) *const MOE__(score_f32)[] = {MOE__(score_f32_1), MOE__(score_f32_2),
                                                    MOE__(score_f32_3), MOE__(score_f32_4)};
static MOE__(score_fn) *const MOE__(score_f16)[] = {MOE__(score_f16_1), MOE__(score_f16_2),
                                                    MOE__(score_f16_3), MOE__(score_f16_4)};
#define MOE__SCORE_Q8_0 NULL
#else
MOE__SCORE_TILE(1, q8_0, MOE_KV_Q8_0)
MOE__SCORE_TILE(2, q8_0, MOE_KV_Q8_0)
MOE__SCORE_TILE(3, q8_0, MOE_KV_Q8_0)
static MOE__(score_fn) *const MOE__(score_f32)[] = {MOE__(score_f32_1), MOE__(score_f32_2),
                                                    MOE__(score_f32_3)};
static MOE__(score_fn) *const MOE__(score_f16)[] = {MOE__(score_f16_1), MOE__(score_f16_2),
                                                    MOE__(score_f16_3)};
static MOE__(score_fn) *const MOE__(score_q8_0)[] = {MOE__(score_q8_0_1), MOE__(score_q8_0_2),
                                                     MOE__(score_q8_0_3)};
#define MOE__SCORE_Q8_0 MOE__(score_q8_0)
#endif
#undef MOE__SCORE_TILES
#undef MOE__SCORE_TILE
static MOE__(score_fn) *const *const MOE__(score_tiles)[] = { // by moe_kv_type
    MOE__(score_f16), MOE__SCORE_Q8_0, MOE__(score_f32)};
#undef MOE__SCORE_Q8_0

// scores[i * MOE__ATTEND_KEYS + j] = query i . key j of a chunk, for every visible key and some
// more. Q8_0 is worth converting from 2 tiles on.
MOE__K void MOE__(attend_scores)(const moe__attend_args *a, attend_chunk *chunk) {
    MOE__ALIGNED(64) float floats[4 * MOE__(ATTEND_DK)];
    const int n = a->n_queries, ragged = a->dk % MOE__VFLOATS, n_keys = chunk->n_keys;
    const int rows = ragged ? 1 : attend_rows(n, MOE__ATTEND_ROWS);
    const int64_t padded = (a->dk + MOE__VFLOATS - 1) / MOE__VFLOATS * MOE__VFLOATS;
    const int tiles = a->type == MOE_KV_Q8_0 ? 2 : MOE__(ATTEND_CONVERT);
    const int convert =
        a->type != MOE_KV_F32 && padded <= MOE__(ATTEND_DK) && n > (tiles - 1) * rows;
    const int32_t *visible = chunk->visible, *first = chunk->first;
    const int early = attend_least(visible, n), late = attend_most(first, n);
    const int64_t fours = (n_keys - chunk->start + 3) / 4;
    const int64_t due = MOE__(attend_due)(chunk, fours * ((n + rows - 1) / rows));
    score_args t;
    t.q_stride = a->q_stride;
    t.dk = a->dk;
    for (int j = chunk->start; j < n_keys; j += 4) {
        t.key = chunk->k + (size_t)j * a->k_bytes;
        t.k_bytes = a->k_bytes;
        t.n_keys = n_keys - j < 4 ? n_keys - j : 4;
        if (convert) {
            for (int c = 0; c < t.n_keys; c++)
                MOE__(kv_to_floats)(t.key + (size_t)c * a->k_bytes, a->type, a->dk,
                                    floats + c * padded);
            t.key = (const uint8_t *)(const void *)floats;
            t.k_bytes = (size_t)padded * sizeof(float);
        }
        for (int i = 0; i < n; i += rows) {
            const int count = n - i < rows ? n - i : rows;
            fetch_stream(&chunk->stream, due);
            if (j < late || j + 4 > early) { // some queries do not see some of the keys
                if (attend_most(visible + i, count) <= j) continue;
                if (attend_least(first + i, count) >= j + 4) continue;
            }
            t.q = a->q + i * a->q_stride;
            t.scores = a->scores + i * MOE__ATTEND_KEYS + j;
            MOE__(score_tiles)[convert ? MOE_KV_F32 : a->type][count - 1](&t);
        }
    }
}

#if MOE__ISA == 3
// Q8_0 keys, by blocks of 32 dimensions and ATTEND_TURNED keys. They are turned, so that
// lanes run over keys: then a block's sums take one multiplication by a vector of scales instead
// of one for each vector of a key, and nothing is summed across, which for 128 values costs half
// as much as their products. Not with AVX2: its vectors are summed across faster, and it has too
// few registers.
enum { ATTEND_TURNED = 64 };

MOE__V __m512i MOE__(load_2_rows)(const uint8_t *row, size_t row_bytes) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(v_load_256(row)), v_load_256(row + row_bytes),
                              1);
}
// The int8 of a block of 16 keys: int32 at + j of out[i] is 4 i .. 4 i + 3
// of key j.
MOE__V void MOE__(turn_block)(const uint8_t *row, size_t row_bytes, int32_t (*out)[ATTEND_TURNED],
                              int at) {
    __m512i half[2][4];
    MOE__UNROLL(4)
    for (int i = 0; i < 4; i++, row += row_bytes) { // rows i, i + 4, i + 8, i + 12, in lanes
        const __m512i a = MOE__(load_2_rows)(row, 4 * row_bytes);
        const __m512i b = MOE__(load_2_rows)(row + 8 * row_bytes, 4 * row_bytes);
        half[0][i] = _mm512_shuffle_i64x2(a, b, 0x88);
        half[1][i] = _mm512_shuffle_i64x2(a, b, 0xDD);
    }
    MOE__UNROLL(2)
    for (int h = 0; h < 2; h++, out += 4) {
        const __m512i a = _mm512_unpacklo_epi32(half[h][0], half[h][1]);
        const __m512i b = _mm512_unpacklo_epi32(half[h][2], half[h][3]);
        const __m512i c = _mm512_unpackhi_epi32(half[h][0], half[h][1]);
        const __m512i d = _mm512_unpackhi_epi32(half[h][2], half[h][3]);
        _mm512_store_si512(out[0] + at, _mm512_unpacklo_epi64(a, b));
        _mm512_store_si512(out[1] + at, _mm512_unpackhi_epi64(a, b));
        _mm512_store_si512(out[2] + at, _mm512_unpacklo_epi64(c, d));
        _mm512_store_si512(out[3] + at, _mm512_unpackhi_epi64(c, d));
    }
}
// Number i of every four int8, times 2^24: it is exact, and takes one instruction to move to the
// top of its int32.
MOE__V __m512 MOE__(turned_load)(const int32_t *p, const int i) {
    const __m128i byte_1 = // of each int32 to the top
        _mm_set_epi8(13, -1, -1, -1, 9, -1, -1, -1, 5, -1, -1, -1, 1, -1, -1, -1);
    const __m128i byte_2 =
        _mm_set_epi8(14, -1, -1, -1, 10, -1, -1, -1, 6, -1, -1, -1, 2, -1, -1, -1);
    __m512i x = v_load(p);
    if (i == 0)
        x = _mm512_slli_epi32(x, 24);
    else if (i == 3)
        x = v_and(x, _mm512_set1_epi32((int)0xFF000000u));
    else
        x = _mm512_shuffle_epi8(x, v_lanes(i == 1 ? byte_1 : byte_2));
    return _mm512_cvtepi32_ps(x);
}

typedef struct block_args {
    const float *q; // 32 values of the tile's first query
    int64_t q_stride;
    const int32_t (*turned)[ATTEND_TURNED]; // of all keys, like scale and scores
    const uint16_t *scale;
    float *scores;
    int at, add; // first key of the tile; whether to add to the scores
} block_args;

// The sums of one query over a block go to its scores, or are added to them.
MOE__V void MOE__(block_add)(const block_args *t, int r, int c, __m512 sum) {
    const __m512 scale = f_mul(f_load_half(t->scale + t->at + 16 * c), f_set(1.0f / (1 << 24)));
    float *to = t->scores + r * MOE__ATTEND_KEYS + t->at + 16 * c;
    const __m512 old = t->add ? f_load(to) : f_zero();
    f_store(to, f_fma(sum, scale, old));
}
// Scores of n queries and so many vectors of keys, as far as one block goes.
MOE__V void block_tile(const int n, const int vectors, const block_args *t) {
    __m512 acc[8][4], k[4];
    MOE__UNROLL(8)
    for (int r = 0; r < 8; r++)
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++) acc[r][c] = f_zero();
    const float *q = t->q;
    for (int i = 0; i < 8; i++, q += 4)
        MOE__UNROLL(4)
        for (int s = 0; s < 4; s++) {
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++)
                if (c < vectors)
                    k[c] = f_keep(MOE__(turned_load)(t->turned[i] + t->at + 16 * c, s));
            MOE__UNROLL(8)
            for (int r = 0; r < 8; r++) {
                if (r >= n) continue;
                const __m512 x = f_keep(f_set(q[r * t->q_stride + s]));
                MOE__UNROLL(4)
                for (int c = 0; c < 4; c++)
                    if (c < vectors) acc[r][c] = f_fma(x, k[c], acc[r][c]);
            }
        }
    MOE__UNROLL(4)
    for (int c = 0; c < 4; c++)
        MOE__UNROLL(8)
        for (int r = 0; r < 8; r++)
            if (c < vectors && r < n) MOE__(block_add)(t, r, c, acc[r][c]);
}
#define MOE__BLOCK_TILE(n, vectors) \
    MOE__K void MOE__(block_##n)(const block_args *t) { block_tile(n, vectors, t); }
MOE__BLOCK_TILE(1, 4)
MOE__BLOCK_TILE(2, 4)
MOE__BLOCK_TILE(3, 4)
MOE__BLOCK_TILE(4, 4)
MOE__BLOCK_TILE(5, 2)
MOE__BLOCK_TILE(6, 2)
MOE__BLOCK_TILE(7, 2)
MOE__BLOCK_TILE(8, 2)
#undef MOE__BLOCK_TILE
typedef void MOE__(block_fn)(const block_args *t);
static MOE__(block_fn) *const MOE__(block_tiles)[] = { // [n - 1]
    MOE__(block_1), MOE__(block_2), MOE__(block_3), MOE__(block_4),
    MOE__(block_5), MOE__(block_6), MOE__(block_7), MOE__(block_8)};

// Block b of n_keys keys, turned, and its scales. Nothing behind the last key is
// read: others repeat the first of its 16.
MOE__V void MOE__(turn_keys)(const uint8_t *key, size_t k_bytes, int b, int n_keys,
                             int32_t (*turned)[ATTEND_TURNED], uint16_t *scale) {
    MOE__ALIGNED(64) uint8_t last[16][34];
    for (int c = 0; c < n_keys; c += 16) {
        const uint8_t *block = key + (size_t)c * k_bytes + 34 * b;
        size_t row_bytes = k_bytes;
        if (n_keys - c < 16) {
            for (int r = 0; r < 16; r++)
                memcpy(last[r], block + (r < n_keys - c ? (size_t)r * row_bytes : 0), 34);
            block = last[0], row_bytes = 34;
        }
        MOE__(q8_0_scales)(block, row_bytes, 16, scale + c);
        MOE__(turn_block)(block + 2, row_bytes, turned, c);
    }
}

// What attend_scores does, for Q8_0
MOE__K void MOE__(attend_scores_q8_0)(const moe__attend_args *a, attend_chunk *chunk) {
    enum { TURNED = ATTEND_TURNED };
    MOE__ALIGNED(64) int32_t turned[8][TURNED];
    MOE__ALIGNED(64) uint16_t scale[TURNED] = {0};
    const int n = a->n_queries, rows = attend_rows(n, MOE__ATTEND_WIDE);
    const int n_turned = (chunk->n_keys - chunk->start + TURNED - 1) / TURNED;
    const int64_t due = MOE__(attend_due)(
        chunk, (int64_t)n_turned * (a->dk / 32) * ((n + rows - 1) / rows));
    block_args t;
    t.q_stride = a->q_stride;
    t.turned = (const int32_t (*)[TURNED])turned;
    t.scale = scale;
    for (int j = chunk->start; j < chunk->n_keys; j += TURNED)
        for (int b = 0; b < a->dk / 32; b++) {
            const int keys = chunk->n_keys - j < TURNED ? chunk->n_keys - j : TURNED;
            MOE__(turn_keys)(chunk->k + (size_t)j * a->k_bytes, a->k_bytes, b, keys, turned, scale);
            t.add = b > 0;
            for (int i = 0; i < n; i += rows) {
                const int count = n - i < rows ? n - i : rows;
                const int most = attend_most(chunk->visible + i, count) - j;
                const int least = attend_least(chunk->first + i, count) - j;
                const int step = count > MOE__ATTEND_FEW ? TURNED / 2 : TURNED;
                fetch_stream(&chunk->stream, due);
                t.q = a->q + i * a->q_stride + 32 * b;
                t.scores = a->scores + i * MOE__ATTEND_KEYS + j;
                for (t.at = 0; t.at < keys; t.at += step)
                    if (most > t.at && least < t.at + step) MOE__(block_tiles)[count - 1](&t);
            }
        }
}
#endif

// Turns the scores of one query, of which it sees first .. n - 1, into weights exp(score - max).
// NaN is never the max. With nothing but -inf, the base is finite: then weights are 0, not NaN.
MOE__K void MOE__(attend_weights)(float *s, int first, int n, float *max, float *sum) {
    enum { V = MOE__VFLOATS };
    const MOE__VF lowest = f_set(-INFINITY);
    MOE__VF m[4], total = f_zero();
    for (int j = n / V * V; j < MOE__ATTEND_KEYS; j += V)
        f_store(s + j, j < n ? f_select_part(n - j, f_load(s + j), lowest) : lowest);
    for (int j = 0; j < first; j++) s[j] = -INFINITY;
    MOE__UNROLL(4)
    for (int c = 0; c < 4; c++) m[c] = lowest;
    for (int j = 0; j < MOE__ATTEND_KEYS; j += 4 * V)
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++) m[c] = f_max(f_load(s + j + c * V), m[c]);
    *max = f_largest(f_max(f_max(m[0], m[1]), f_max(m[2], m[3])));
    const MOE__VF base = f_set(*max > -FLT_MAX ? *max : -FLT_MAX);
    for (int j = 0; j < MOE__ATTEND_KEYS; j += 4 * V)
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++) {
            const MOE__VF e = f_exp(f_sub(f_load(s + j + c * V), base));
            f_store(s + j + c * V, e);
            total = f_add(total, e);
        }
    *sum = f_sum(total);
}

// Max and sum of a chunk are added to those of all chunks before it: what both count for.
typedef struct attend_joined {
    MOE__VF add, old, max, sum;
} attend_joined;

MOE__V attend_joined MOE__(attend_join)(MOE__VF max, MOE__VF sum, MOE__VF all_max,
                                        MOE__VF all_sum) {
    attend_joined both;
    both.max = f_max(max, all_max);
    const MOE__VF base = f_max(both.max, f_set(-FLT_MAX));
    both.add = f_exp(f_sub(max, base));
    both.old = f_exp(f_sub(all_max, base));
    both.sum = f_fma(both.add, sum, f_rounded(f_mul(both.old, all_sum)));
    return both;
}
// The same for n values of out.
MOE__V void attend_out(float *out, int n, MOE__VF add, MOE__VF x, MOE__VF old) {
    if (n >= MOE__VFLOATS) {
        const MOE__VF y = f_rounded(f_mul(old, f_load(out)));
        f_store(out, f_fma(add, x, y));
    } else {
        const MOE__VF y = f_rounded(f_mul(old, f_load_part(out, n)));
        f_store_part(out, n, f_fma(add, x, y));
    }
}
MOE__K void MOE__(attend_add)(float max, float sum, const float *x, int64_t dv, float *all_max,
                              float *all_sum, float *all) {
    const attend_joined both =
        MOE__(attend_join)(f_set(max), f_set(sum), f_set(*all_max), f_set(*all_sum));
    *all_max = f_first(both.max);
    *all_sum = f_first(both.sum);
    int64_t i = 0;
    for (; i + MOE__VFLOATS <= dv; i += MOE__VFLOATS)
        attend_out(all + i, MOE__VFLOATS, both.add, f_load(x + i), both.old);
    if (i < dv) attend_out(all + i, (int)(dv - i), both.add, f_load_part(x + i, dv - i), both.old);
}
// All queries' max and sum, and what their sums of values will be added with
MOE__K void MOE__(attend_join_all)(const moe__attend_args *a, attend_chunk *c) {
    for (int i = 0; i < a->n_queries; i += MOE__VFLOATS) {
        const int n = (int)moe__min(a->n_queries - i, MOE__VFLOATS);
        const attend_joined both =
            MOE__(attend_join)(f_load(c->max + i), f_load(c->sum + i), f_load_part(a->max + i, n),
                               f_load_part(a->sum + i, n));
        f_store(c->add + i, both.add);
        f_store(c->old + i, both.old);
        f_store_part(a->max + i, n, both.max);
        f_store_part(a->sum + i, n, both.sum);
    }
}

typedef struct value_args {
    const uint8_t *value;    // of key j0, at the tile's first column (Q8_0: its int8)
    size_t v_bytes;
    int32_t width;           // floats of the tile: whole vectors, or at most one
    int32_t j0, j, end;      // all of the tile's queries see keys j .. end - 1
    int32_t begins, ends;    // whether no keys were before; whether none will follow: else sums
                             // are read from part, and left there
    const float *weights;    // of key j0
    int32_t stride, step;    // floats from query to query; of Q8_0: from block to block
    float *part;             // 4 vectors per query
    const float *add, *old;  // per query: out = add * sums + old * out
    float *const *out;       // per query
    int32_t column;          // of out
    const uint8_t *ahead;    // to prefetch per key: so many bytes
    int64_t ahead_bytes;
} value_args;

// Vector c of a value: whole ones if there are several columns, else the only one.
MOE__V MOE__VF value_load(const value_args *t, const uint8_t *value, int columns, int c,
                          moe_kv_type type) {
    const int at = c * MOE__VFLOATS;
    if (type == MOE_KV_Q8_0) return f_load_i8(value + at + at / 32 * 2);
    if (columns > 1) return kv_load(value, at, type);
    return kv_load_part(value, 0, t->width, type);
}
// The weight of query r for vector c of a key, whose weights begin at w. AVX2 has floats of Q8_0
// with that type's weights.
MOE__V MOE__VF value_weight(const value_args *t, const float *w, int r, int c, moe_kv_type type) {
    if (type == MOE_KV_Q8_0) return f_set(w[r * t->stride + c * MOE__VFLOATS / 32 * t->step]);
    return f_set(w[r * (MOE__ISA == 2 && type == MOE_KV_F32 ? t->stride : MOE__ATTEND_KEYS)]);
}
MOE__V void value_tile(const int n, const int columns, const moe_kv_type type,
                       const value_args *t) {
    MOE__VF acc[MOE__ATTEND_WIDE][4], w[MOE__ATTEND_ROWS], v[2];
    const uint8_t *value = t->value + (size_t)(t->j - t->j0) * t->v_bytes, *ahead = t->ahead;
    const float *weights = t->weights + (t->j - t->j0), *end = t->weights + (t->end - t->j0);
    MOE__UNROLL(MOE__ATTEND_WIDE)
    for (int r = 0; r < MOE__ATTEND_WIDE; r++)
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++)
            acc[r][c] = f_zero();
    if (!t->begins) {
        MOE__UNROLL(MOE__ATTEND_WIDE)
        for (int r = 0; r < MOE__ATTEND_WIDE; r++)
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++)
                if (r < n && c < columns)
                    acc[r][c] = f_load(t->part + (r * 4 + c) * MOE__VFLOATS);
    }
    for (; weights < end; weights++, value += t->v_bytes, ahead += t->ahead_bytes) {
        for (int64_t i = 0; i < t->ahead_bytes; i += 64) fetch_line(ahead + i);
        if (n > MOE__ATTEND_FEW && columns == 2) { // values stay in registers, else weights
            MOE__UNROLL(2)
            for (int c = 0; c < 2; c++) v[c] = f_keep(value_load(t, value, columns, c, type));
            MOE__UNROLL(MOE__ATTEND_WIDE)
            for (int r = 0; r < MOE__ATTEND_WIDE; r++) {
                if (r >= n) continue;
                const MOE__VF x = f_keep(value_weight(t, weights, r, 0, type));
                MOE__UNROLL(2)
                for (int c = 0; c < 2; c++) acc[r][c] = f_fma(x, v[c], acc[r][c]);
            }
            continue;
        }
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++) {
            if (c >= columns) continue;
            MOE__UNROLL(MOE__ATTEND_ROWS)
            for (int r = 0; r < MOE__ATTEND_ROWS; r++)
                if (r < n && (c == 0 || (type == MOE_KV_Q8_0 && c * MOE__VFLOATS % 32 == 0)))
                    w[r] = value_weight(t, weights, r, c, type);
            const MOE__VF x = f_keep(value_load(t, value, columns, c, type));
            MOE__UNROLL(MOE__ATTEND_ROWS)
            for (int r = 0; r < MOE__ATTEND_ROWS; r++)
                if (r < n) acc[r][c] = f_fma(w[r], x, acc[r][c]);
        }
    }
    if (!t->ends) {
        float *part = t->part;
        MOE__UNROLL(MOE__ATTEND_WIDE)
        for (int r = 0; r < MOE__ATTEND_WIDE; r++)
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++)
                if (r < n && c < columns) f_store(part + (r * 4 + c) * MOE__VFLOATS, acc[r][c]);
        return;
    }
    MOE__UNROLL(MOE__ATTEND_WIDE)
    for (int r = 0; r < MOE__ATTEND_WIDE; r++) {
        if (r >= n) continue;
        float *out = t->out[r] + t->column;
        const MOE__VF add = f_set(t->add[r]), old = f_set(t->old[r]);
        const int width = columns > 1 ? MOE__VFLOATS : t->width;
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++)
            if (c < columns) attend_out(out + c * MOE__VFLOATS, width, add, acc[r][c], old);
    }
}

// One function for each n, [n - 1], width and type. What is rare has one for a single query only.
#define MOE__VALUE_TILE(n, columns, name, type)                             \
    MOE__K void MOE__(value_##name##_##columns##_##n)(const value_args *t) { \
        value_tile(n, columns, type, t);                                    \
    }
typedef void MOE__(value_fn)(const value_args *t);
MOE__VALUE_TILE(1, 1, f32, MOE_KV_F32)
MOE__VALUE_TILE(1, 1, f16, MOE_KV_F16)
MOE__VALUE_TILE(1, 4, f32, MOE_KV_F32)
MOE__VALUE_TILE(2, 4, f32, MOE_KV_F32)
MOE__VALUE_TILE(3, 4, f32, MOE_KV_F32)
MOE__VALUE_TILE(1, 4, f16, MOE_KV_F16)
MOE__VALUE_TILE(2, 4, f16, MOE_KV_F16)
MOE__VALUE_TILE(3, 4, f16, MOE_KV_F16)
MOE__VALUE_TILE(1, 4, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(2, 4, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(1, 2, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(4, 2, q8_0, MOE_KV_Q8_0)
#if MOE__ISA == 3
MOE__VALUE_TILE(4, 4, f32, MOE_KV_F32)
MOE__VALUE_TILE(4, 4, f16, MOE_KV_F16)
MOE__VALUE_TILE(3, 4, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(4, 4, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(5, 2, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(6, 2, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(7, 2, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(8, 2, q8_0, MOE_KV_Q8_0)
static MOE__(value_fn) *const MOE__(value_f32)[] = {MOE__(value_f32_4_1), MOE__(value_f32_4_2),
                                                    MOE__(value_f32_4_3), MOE__(value_f32_4_4)};
static MOE__(value_fn) *const MOE__(value_f16)[] = {MOE__(value_f16_4_1), MOE__(value_f16_4_2),
                                                    MOE__(value_f16_4_3), MOE__(value_f16_4_4)};
static MOE__(value_fn) *const MOE__(value_q8_0)[] = {MOE__(value_q8_0_4_1), MOE__(value_q8_0_4_2),
                                                     MOE__(value_q8_0_4_3), MOE__(value_q8_0_4_4)};
static MOE__(value_fn) *const MOE__(value_q8_0_half)[] = {
    MOE__(value_q8_0_2_1), NULL,                  NULL,                  MOE__(value_q8_0_2_4),
    MOE__(value_q8_0_2_5), MOE__(value_q8_0_2_6), MOE__(value_q8_0_2_7), MOE__(value_q8_0_2_8)};
#else
MOE__VALUE_TILE(2, 2, q8_0, MOE_KV_Q8_0)
MOE__VALUE_TILE(3, 2, q8_0, MOE_KV_Q8_0)
static MOE__(value_fn) *const MOE__(value_f32)[] = {MOE__(value_f32_4_1), MOE__(value_f32_4_2),
                                                    MOE__(value_f32_4_3)};
static MOE__(value_fn) *const MOE__(value_f16)[] = {MOE__(value_f16_4_1), MOE__(value_f16_4_2),
                                                    MOE__(value_f16_4_3)};
static MOE__(value_fn) *const MOE__(value_q8_0)[] = {MOE__(value_q8_0_4_1),
                                                     MOE__(value_q8_0_4_2)};
static MOE__(value_fn) *const MOE__(value_q8_0_half)[] = {
    MOE__(value_q8_0_2_1), MOE__(value_q8_0_2_2), MOE__(value_q8_0_2_3), MOE__(value_q8_0_2_4)};
#endif
#undef MOE__VALUE_TILE
// NULL: there is none for more than one query.
MOE__K MOE__(value_fn) *MOE__(value_tile_of)(int n, moe_kv_type type, int width) {
    if (type == MOE_KV_Q8_0)
        return n > MOE__ATTEND_FEW || width <= 2 * MOE__VFLOATS ? MOE__(value_q8_0_half)[n - 1]
                                                                : MOE__(value_q8_0)[n - 1];
    if (width > MOE__VFLOATS)
        return type == MOE_KV_F16 ? MOE__(value_f16)[n - 1] : MOE__(value_f32)[n - 1];
    if (n > 1) return NULL;
    return type == MOE_KV_F16 ? MOE__(value_f16_1_1) : MOE__(value_f32_1_1);
}

// Keys j0 .. j1 - 1 of n queries, of which query r sees first[r] .. visible[r] - 1: those that
// all of them see as one tile, then what is left for each query by itself.
MOE__K void MOE__(value_queries)(int n, moe_kv_type type, int whole, const int32_t *first,
                                 const int32_t *visible, int j1, value_args *t) {
    MOE__(value_fn) *const tile = MOE__(value_tile_of)(n, type, t->width);
    const int begins = t->begins, ends = t->ends;
    int j = t->j0, least = j1, end = j1; // least: of the first keys
    for (int r = 0; r < n && !whole; r++) {
        if (visible[r] < end) end = visible[r];
        if (first[r] < least) least = first[r];
        if (first[r] > j) j = first[r];
    }
    // Windows that begin within this step: each query for itself
    const int together = tile && (whole || (j < end && j == moe__max(least, t->j0)));
    if (together) {
        t->j = j, t->end = end;
        t->ends = ends && end == j1;
        tile(t);
        if (end == j1) {
            t->ends = ends;
            return;
        }
    }
    value_args one = *t;
    one.ends = ends;
    one.begins = begins && !together;
    one.ahead_bytes = 0;
    for (int r = 0; r < n; r++) {
        one.j = (int)moe__min(moe__max(first[r], together ? end : t->j0), j1);
        one.end = (int)moe__max(moe__min(visible[r], j1), one.j);
        if (visible[r] > 0) MOE__(value_tile_of)(1, type, t->width)(&one);
        one.weights += t->stride;
        one.part += 4 * MOE__VFLOATS;
        one.add++, one.old++, one.out++;
    }
    t->ends = ends;
}

// Weights of a step for Q8_0 blocks with these scales:
// out[i * stride + j] = weight j of query i * scale j
MOE__V void MOE__(step_weights)(const moe__attend_args *a, int j0, int keys,
                                const uint16_t *scale, float *out, int stride) {
    for (int j = 0; j < keys; j += 4 * MOE__VFLOATS) {
        MOE__VF x[4];
        MOE__UNROLL(4)
        for (int s = 0; s < 4; s++) x[s] = f_load_half(scale + j + s * MOE__VFLOATS);
        for (int i = 0; i < a->n_queries; i++) {
            const float *from = a->scores + i * MOE__ATTEND_KEYS + j0 + j;
            float *to = out + i * stride + j;
            MOE__UNROLL(4)
            for (int s = 0; s < 4 * MOE__VFLOATS; s += MOE__VFLOATS)
                f_store(to + s, f_mul(x[s / MOE__VFLOATS], f_load(from + s)));
        }
    }
}
// Values of a step and a tile's columns to floats, 4 vectors apart; of Q8_0 without the scales.
MOE__V void MOE__(step_floats)(const value_args *t, int end, moe_kv_type type, float *out) {
    const uint8_t *value = t->value;
    for (int j = t->j0; j < end; j++, value += t->v_bytes, out += 4 * MOE__VFLOATS) {
        if (type == MOE_KV_F16)
            MOE__(kv_to_floats)(value, type, t->width, out);
        else
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++)
                f_store(out + c * MOE__VFLOATS, value_load(t, value, 4, c, MOE_KV_Q8_0));
    }
}

// How a chunk is cut into tiles: keys of a step, floats that are as wide as a tile, queries that
// are as high; whether values are converted for all tiles of a column and step at once.
typedef struct value_cut {
    int32_t step, wide, rows, convert;
} value_cut;

MOE__V value_cut MOE__(value_cut_of)(moe_kv_type type, int n) {
    const int q8_0 = type == MOE_KV_Q8_0;
    value_cut cut;
    cut.convert = type != MOE_KV_F32 && (MOE__ISA == 2 || !q8_0) &&
                  n > (MOE__(ATTEND_CONVERT) - 1) * MOE__ATTEND_ROWS;
    const int itself = q8_0 && !cut.convert; // each tile for itself
    cut.rows = attend_rows(n, itself ? MOE__ATTEND_WIDE : MOE__ATTEND_ROWS);
    cut.wide = (itself && cut.rows > MOE__ATTEND_FEW ? 2 : 4) * MOE__VFLOATS;
    cut.step = MOE__ATTEND_KEYS;
    if (cut.convert || n > MOE__(ATTEND_TOGETHER) || (type == MOE_KV_F32 && n > cut.rows))
        cut.step = ATTEND_STEP;
    return cut;
}
// What is fetched is spread over all tiles and keys.
MOE__V void MOE__(value_ahead)(const moe__attend_args *a, const attend_chunk *chunk,
                               const value_cut *cut, value_args *t) {
    const int n_columns = a->dv / cut->wide +
                          (a->dv % cut->wide + MOE__VFLOATS - 1) / MOE__VFLOATS;
    const int n_tiles = n_columns * ((a->n_queries + cut->rows - 1) / cut->rows);
    const int64_t keys = (int64_t)(chunk->n_keys - chunk->start) * n_tiles;
    t->ahead = chunk->ahead;
    t->ahead_bytes = (chunk->ahead_rows * chunk->ahead_bytes + keys - 1) / keys;
}

// The weights of a step's keys for a tile's columns of Q8_0 values
MOE__V void MOE__(value_weights)(const moe__attend_args *a, const attend_chunk *chunk,
                                 const value_args *t, int end, float *out) {
    MOE__ALIGNED(64) uint16_t scale[MOE__ATTEND_KEYS] = {0};
    const uint8_t *block = chunk->v + (size_t)t->j0 * a->v_bytes + t->column / 32 * 34;
    for (int c = 0; c < t->width; c += 32, block += 34, out += t->step) {
        MOE__(q8_0_scales)(block, a->v_bytes, end - t->j0, scale);
        MOE__(step_weights)(a, t->j0, end - t->j0, scale, out, t->stride);
    }
}

// The tiles of one column of values and one step of keys (up to `end`); of all queries
MOE__V void MOE__(value_column)(const moe__attend_args *a, const attend_chunk *chunk,
                                const value_cut *cut, int end, int whole, const float *weights,
                                float *part, value_args *t) {
    const int n = a->n_queries;
    if (!weights) weights = a->scores + t->j0;
    for (int i = 0; i < n; i += cut->rows) {
        t->weights = weights + i * t->stride;
        t->part = part + i * 4 * MOE__VFLOATS;
        t->add = chunk->add + i;
        t->old = chunk->old + i;
        t->out = a->out + i;
        MOE__(value_queries)((int)moe__min(n - i, cut->rows),
                             cut->convert ? MOE_KV_F32 : a->type, whole, chunk->first + i,
                             chunk->visible + i, end, t);
        t->ahead += (end - t->j0) * t->ahead_bytes;
    }
}

// out = add * the weighted values of a chunk + old * out, for all queries
MOE__K void MOE__(attend_values)(const moe__attend_args *a, const attend_chunk *chunk) {
    enum { V = MOE__VFLOATS };
    MOE__ALIGNED(64) float floats[ATTEND_STEP * 4 * V];
    MOE__ALIGNED(64) float part[MOE__ATTEND_QUERIES * 4 * V];
    MOE__ALIGNED(64) float scaled[MOE__(ATTEND_SCALED)];
    const int n = a->n_queries, q8_0 = a->type == MOE_KV_Q8_0;
    float *const weights = q8_0 ? scaled : NULL;
    const value_cut cut = MOE__(value_cut_of)(a->type, n);
    const int all_first = attend_most(chunk->first, n);
    const int all_end = attend_least(chunk->visible, n);
    value_args t;
    t.step = cut.step;
    MOE__(value_ahead)(a, chunk, &cut, &t);
    for (t.column = 0; t.column < a->dv; t.column += t.width) {
        const int left = a->dv - t.column;
        t.width = left >= cut.wide ? cut.wide : q8_0 ? 2 * V : left < V ? left : V;
        t.stride = q8_0 ? (t.width + 31) / 32 * cut.step : (int)MOE__ATTEND_KEYS;
        for (t.j0 = chunk->start; t.j0 < chunk->n_keys; t.j0 += cut.step) {
            const int end = (int)moe__min(t.j0 / cut.step * cut.step + cut.step, chunk->n_keys);
            const int whole = all_first <= t.j0 && all_end >= end;
            t.begins = t.j0 == chunk->start;
            t.ends = end == chunk->n_keys;
            t.value = chunk->v + (size_t)t.j0 * a->v_bytes + moe__kv_bytes(a->type, t.column);
            if (q8_0) t.value += 2 + t.column % 32;
            t.v_bytes = a->v_bytes;
            if (q8_0)
                MOE__(value_weights)(a, chunk, &t, end, weights);
            if (cut.convert) {
                MOE__(step_floats)(&t, end, a->type, floats);
                t.value = (const uint8_t *)(const void *)floats;
                t.v_bytes = 4 * V * sizeof(float);
            }
            MOE__(value_column)(a, chunk, &cut, end, whole, weights, part, &t);
        }
    }
}

MOE__K void MOE__(attend)(const moe__attend_args *a) {
    attend_chunk c;
    int begins = 1, key = a->n_keys, most = 0;
    for (int i = 0; i < MOE__ATTEND_QUERIES; i++) c.max[i] = -INFINITY, c.sum[i] = 0;
    for (int i = 0; i < a->n_queries; i++) {
        const int first = a->first ? a->first[i] : 0;
        const int end = a->n_visible ? a->n_visible[i] : a->n_keys;
        if (first >= end) continue;
        if (first < key) key = first;
        if (end > most) most = end;
    }
    for (key = key / MOE__ATTEND_KEYS * MOE__ATTEND_KEYS; key < most; key += MOE__ATTEND_KEYS) {
        if (!MOE__(attend_chunk_at)(a, key, &c)) continue;
        MOE__(attend_ahead)(a, &c, most - key - MOE__ATTEND_KEYS, begins);
        begins = 0;
#if MOE__ISA == 3
        if (a->type == MOE_KV_Q8_0)
            MOE__(attend_scores_q8_0)(a, &c);
        else
#endif
            MOE__(attend_scores)(a, &c);
        for (int i = 0; i < a->n_queries; i++) {
            c.max[i] = -INFINITY, c.sum[i] = 0;
            if (c.visible[i] > 0)
                MOE__(attend_weights)(a->scores + i * MOE__ATTEND_KEYS, c.first[i], c.visible[i],
                                      &c.max[i], &c.sum[i]);
        }
        MOE__(attend_join_all)(a, &c);
        MOE__(attend_values)(a, &c);
    }
}

// ---- recurrences -----------------------------------------------------------------------------
//
// A call of recur has three parts, see moe__recur_args.
//
//   products   of each token's k and q and the keys of the chunk up to its own: lanes are tokens
//              of the chunk, and one pass over the keys also makes them decay
//   reading    S_0^T k and S_0^T q: lanes are columns, tiles of columns times vectors; the first
//              state S_0 is read once for up to 6 vectors. A single token reads it row by row, as
//              it lies in memory
//   tokens     one after another: what the deltas before them add, their own delta, out
//
// With a single decay per token S_0 is multiplied with k and q as they are, and the product of
// decays with the result; with one per row k and q decay beforehand, in scratch. Every sum is a
// chain of fused multiply-adds of its own in ascending order, or, of products, a fixed number of
// such chains: its bits depend neither on what is computed beside it nor on how calls cut the
// chunk and the columns.
#if MOE__ISA == 2
#define MOE__RECUR_COLUMNS 2 // vectors of a tile: 12 sums, 2 of S_0, 1 factor of 16 registers
#else
#define MOE__RECUR_COLUMNS 4 // 24 sums, 4 of S_0, 1 factor of 32
#endif

enum {
    MOE__(RECUR_VECTORS) = 6, // k and q of a tile
    MOE__(RECUR_BLOCK) = 4 * MOE__VFLOATS, // columns that are read before their tokens' turn
    MOE__(RECUR_ROWS) = 16, // rows of S_0 that a single token takes at a time
    MOE__(RECUR_AHEAD) = 2048 // floats that are fetched ahead of those it reads
};

typedef struct recur_job {
    const moe__recur_args *args;
    const float *x[2 * MOE__CHUNK]; // what S_0 is multiplied with: of each token k, if there is
                                    // beta, and q
    float total[MOE__CHUNK];        // of each token: factor of these products
    MOE__ALIGNED(64) float of_k[MOE__CHUNK][MOE__CHUNK]; // [i][j]: token i's k and q times what
    MOE__ALIGNED(64) float of_q[MOE__CHUNK][MOE__CHUNK]; // is left of key j of the chunk
} recur_job;

// The keys of the call's tokens go beside those before, four tokens at a time: one by one they
// would take a store per value.
MOE__V void MOE__(recur_keys)(const moe__recur_args *args) {
    float *to = args->keys + args->done;
    const float *k = args->k;
    int i = 0;
    for (; i + 4 <= args->n; i += 4, k += 4 * args->k_stride) {
        int r = 0;
        for (; r + 4 <= args->n_k; r += 4) {
            __m128 a = _mm_loadu_ps(k + r), b = _mm_loadu_ps(k + args->k_stride + r);
            __m128 c = _mm_loadu_ps(k + 2 * args->k_stride + r);
            __m128 d = _mm_loadu_ps(k + 3 * args->k_stride + r);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(to + i + r * MOE__CHUNK, a);
            _mm_storeu_ps(to + i + (r + 1) * MOE__CHUNK, b);
            _mm_storeu_ps(to + i + (r + 2) * MOE__CHUNK, c);
            _mm_storeu_ps(to + i + (r + 3) * MOE__CHUNK, d);
        }
        for (; r < args->n_k; r++)
            for (int j = 0; j < 4; j++) to[i + j + r * MOE__CHUNK] = k[j * args->k_stride + r];
    }
    for (; i < args->n; i++, k += args->k_stride)
        for (int r = 0; r < args->n_k; r++) {
            float x = k[r];
            __asm__("" : "+x"(x)); // clang would scatter them, which takes longer
            to[i + r * MOE__CHUNK] = x;
        }
}

// One more decay of weights, which has a lane for each of p tokens before; the next ones begin
// with 1.
MOE__V void MOE__(recur_weights)(float *weights, int p, float decay) {
    for (int j = 0; j < MOE__CHUNK; j += MOE__VFLOATS) {
        const int64_t before = moe__max(0, moe__min(p - j, MOE__VFLOATS));
        const MOE__VF x = f_mul(f_load(weights + j), f_set(decay));
        f_store(weights + j, f_select_part(before, x, f_set(1.0f)));
    }
}
// One more decay per row, which is also that of token i's k and q.
MOE__V void MOE__(recur_totals)(const moe__recur_args *args, int i, float *k, float *q) {
    const float *decay = args->decay + i * args->decay_stride;
    for (int r = 0; r < args->n_k; r += MOE__VFLOATS) {
        const int64_t n = args->n_k - r;
        const MOE__VF x = f_mul(f_load_n(args->total + r, n), f_load_n(decay + r, n));
        f_store_n(args->total + r, n, x);
        f_store_n(q + r, n, f_mul(x, f_load_n(args->q + i * args->q_stride + r, n)));
        f_store_n(k + r, n, f_mul(x, f_load_n(args->k + i * args->k_stride + r, n)));
    }
}

// Up to four vectors of keys, n_rows rows, times values of q and k go to sums of their own. With
// `rows` they decay first: before and behind are factors, 1 for lanes of tokens before and behind,
// else 0. (A decay that is not finite spoils all lanes, and with S all tokens to come anyhow.)
MOE__V void MOE__(recur_rows)(const int rows, const int both, int n_rows, const float *q,
                              const float *k, const float *decay, float *keys,
                              const MOE__VF *before, const MOE__VF *behind, MOE__VF *of_q,
                              MOE__VF *of_k) {
    enum { V = MOE__VFLOATS, PARTS = MOE__CHUNK / V };
    MOE__UNROLL(4)
    for (int r = 0; r < 4 / PARTS; r++) {
        if (r >= n_rows) continue;
        const MOE__VF by_q = f_keep(f_set(q[r])), by_k = both ? f_keep(f_set(k[r])) : f_zero();
        MOE__UNROLL(2)
        for (int h = 0; h < PARTS; h++) {
            const int c = r * PARTS + h;
            MOE__VF x = f_keep(f_load(keys + c * V));
            if (rows) {
                x = f_mul(x, f_fma(before[h], f_set(decay[r]), behind[h]));
                f_store(keys + c * V, x);
            }
            of_q[c] = f_fma(by_q, x, of_q[c]);
            if (both) of_k[c] = f_fma(by_k, x, of_k[c]);
        }
    }
}
// Row of_q[i] and, with both, of_k[i]: four sums each, for groups of four vectors of keys. Lanes of
// tokens behind hold anything. rows and both are constants once inlined.
MOE__V void MOE__(recur_products)(const int rows, const int both, recur_job *job, int i) {
    enum { V = MOE__VFLOATS, PARTS = MOE__CHUNK / V, STEP = 4 / PARTS };
    const moe__recur_args *args = job->args;
    const float *q = args->q + i * args->q_stride, *k = args->k + i * args->k_stride;
    const float *decay = args->decay + i * args->decay_stride;
    const int p = args->done + i, n_k = args->n_k;
    float *keys = args->keys;
    MOE__VF of_q[4], of_k[4], before[2], behind[2];
    MOE__UNROLL(2)
    for (int c = 0; c < PARTS; c++) {
        const int64_t n = moe__max(0, moe__min(p - c * V, V));
        before[c] = f_keep(f_select_part(n, f_set(1.0f), f_zero()));
        behind[c] = f_keep(f_select_part(n, f_zero(), f_set(1.0f)));
    }
    MOE__UNROLL(4)
    for (int c = 0; c < 4; c++) of_q[c] = of_k[c] = f_zero();
    int r = 0;
    for (; r + STEP <= n_k; r += STEP)
        MOE__(recur_rows)(rows, both, STEP, q + r, k + r, decay + r, keys + r * MOE__CHUNK, before,
                          behind, of_q, of_k);
    MOE__(recur_rows)(rows, both, n_k - r, q + r, k + r, decay + r, keys + r * MOE__CHUNK, before,
                      behind, of_q, of_k);
    MOE__UNROLL(2)
    for (int h = 0; h < PARTS; h++) {
        const MOE__VF w = f_load(args->weights + h * V);
        MOE__VF sum_q = of_q[h], sum_k = of_k[h];
        MOE__UNROLL(4)
        for (int c = h + PARTS; c < 4; c += PARTS) {
            sum_q = f_add(sum_q, of_q[c]);
            sum_k = f_add(sum_k, of_k[c]);
        }
        f_store(job->of_q[i] + h * V, f_mul(w, sum_q));
        if (both) f_store(job->of_k[i] + h * V, f_mul(w, sum_k));
    }
}
#define MOE__RECUR_PRODUCTS(name, rows, both)                         \
    MOE__K void MOE__(recur_products_##name)(recur_job *job, int i) { \
        MOE__(recur_products)(rows, both, job, i);                    \
    }
MOE__RECUR_PRODUCTS(q, 0, 0)
MOE__RECUR_PRODUCTS(kq, 0, 1)
MOE__RECUR_PRODUCTS(rows_q, 1, 0)
MOE__RECUR_PRODUCTS(rows_kq, 1, 1)
#undef MOE__RECUR_PRODUCTS

// Decays, products and what S_0 is to be multiplied with. Returns how many vectors these are.
MOE__K int MOE__(recur_prepare)(recur_job *job) {
    const moe__recur_args *args = job->args;
    const int rows = args->n_decay > 1, both = args->beta != NULL;
    float *scratch = args->scratch;
    int n = 0;
    for (int i = 0; i < args->n; i++) {
        const float *q = args->q + i * args->q_stride, *k = args->k + i * args->k_stride;
        const float decay = rows ? 1 : args->decay[i * args->decay_stride];
        MOE__(recur_weights)(args->weights, args->done + i, decay);
        job->total[i] = 1;
        if (rows) {
            MOE__(recur_totals)(args, i, scratch, scratch + args->n_k);
            k = scratch, q = scratch + args->n_k;
            scratch += 2 * args->n_k;
            both ? MOE__(recur_products_rows_kq)(job, i) : MOE__(recur_products_rows_q)(job, i);
        } else {
            job->total[i] = args->total[0] *= decay;
            both ? MOE__(recur_products_kq)(job, i) : MOE__(recur_products_q)(job, i);
        }
        if (both) job->x[n++] = k;
        job->x[n++] = q;
    }
    return n;
}

typedef struct read_args {
    const float *state; // from the tile's first row and column
    int64_t stride;
    int32_t n_k, width; // rows; columns: whole vectors, or at most one
    int32_t begins;     // whether sums begin here, or go on from y
    int64_t ahead;      // what is fetched: so many floats behind what is read
    const float *x[MOE__(RECUR_VECTORS)]; // from the tile's first row
    float *y;           // sums: of each x a vector per column
    int64_t y_stride;
} read_args;

MOE__V void read_tile(const int n, const int columns, const read_args *t) {
    enum { X = MOE__(RECUR_VECTORS), C = 2 * MOE__RECUR_COLUMNS, V = MOE__VFLOATS };
    MOE__VF acc[X][C], s[C], w[2];
    MOE__UNROLL(8)
    for (int v = 0; v < X; v++)
        MOE__UNROLL(8)
        for (int c = 0; c < C; c++) acc[v][c] = f_zero();
    if (!t->begins)
        MOE__UNROLL(8)
        for (int v = 0; v < X; v++)
            MOE__UNROLL(8)
            for (int c = 0; c < C; c++)
                if (v < n && c < columns) acc[v][c] = f_load(t->y + v * t->y_stride + c * V);
    const float *state = t->state, *x[X];
    const int64_t stride = t->stride, ahead = t->ahead;
    MOE__UNROLL(8)
    for (int v = 0; v < X; v++) x[v] = t->x[v < n ? v : 0];
    for (int r = 0; r < t->n_k; r++, state += stride) {
        if (n <= 2 && columns > 1) { // factors stay in registers, else vectors of S_0
            MOE__UNROLL(2)
            for (int v = 0; v < 2; v++)
                if (v < n) w[v] = f_keep(f_set(x[v][r]));
            MOE__UNROLL(8)
            for (int c = 0; c < C; c++) {
                if (c >= columns) continue;
                if (c * V % 16 == 0) fetch_line(state + ahead + c * V);
                s[c] = f_keep(f_load(state + c * V));
                MOE__UNROLL(2)
                for (int v = 0; v < 2; v++)
                    if (v < n) acc[v][c] = f_fma(w[v], s[c], acc[v][c]);
            }
            continue;
        }
        MOE__UNROLL(8)
        for (int c = 0; c < C; c++)
            if (c < columns)
                s[c] = f_keep(columns > 1 ? f_load(state + c * V) : f_load_part(state, t->width));
        MOE__UNROLL(8)
        for (int v = 0; v < X; v++) {
            if (v >= n) continue;
            const MOE__VF y = f_keep(f_set(x[v][r]));
            MOE__UNROLL(8)
            for (int c = 0; c < C; c++)
                if (c < columns) acc[v][c] = f_fma(y, s[c], acc[v][c]);
        }
    }
    MOE__UNROLL(8)
    for (int v = 0; v < X; v++)
        MOE__UNROLL(8)
        for (int c = 0; c < C; c++)
            if (v < n && c < columns) f_store(t->y + v * t->y_stride + c * V, acc[v][c]);
}

// One function for each n, [n - 1], and width
typedef void MOE__(read_fn)(const read_args *t);
#define MOE__READ_TILE(n)                                                        \
    MOE__K void MOE__(read_part_##n)(const read_args *t) { read_tile(n, 1, t); } \
    MOE__K void MOE__(read_##n)(const read_args *t) { read_tile(n, MOE__RECUR_COLUMNS, t); }
MOE__READ_TILE(1)
MOE__READ_TILE(2)
MOE__READ_TILE(3)
MOE__READ_TILE(4)
MOE__READ_TILE(5)
MOE__READ_TILE(6)
#undef MOE__READ_TILE
MOE__K void MOE__(read_wide_1)(const read_args *t) { read_tile(1, 2 * MOE__RECUR_COLUMNS, t); }
MOE__K void MOE__(read_wide_2)(const read_args *t) { read_tile(2, 2 * MOE__RECUR_COLUMNS, t); }
static MOE__(read_fn) *const MOE__(read_part)[] = {MOE__(read_part_1), MOE__(read_part_2),
                                                   MOE__(read_part_3), MOE__(read_part_4),
                                                   MOE__(read_part_5), MOE__(read_part_6)};
static MOE__(read_fn) *const MOE__(read_full)[] = {MOE__(read_1), MOE__(read_2), MOE__(read_3),
                                                   MOE__(read_4), MOE__(read_5), MOE__(read_6)};
static MOE__(read_fn) *const MOE__(read_wide)[] = {MOE__(read_wide_1), MOE__(read_wide_2)};

// So many columns as come next of `left`; tile: what reads n vectors of them.
MOE__V int MOE__(read_width)(int left, int n, MOE__(read_fn) **tile) {
    enum { V = MOE__VFLOATS, FULL = MOE__RECUR_COLUMNS * V };
    if (n <= 2 && left >= 2 * FULL) {
        *tile = MOE__(read_wide)[n - 1];
        return 2 * FULL;
    }
    *tile = left >= FULL ? MOE__(read_full)[n - 1] : MOE__(read_part)[n - 1];
    return left >= FULL ? FULL : left < V ? left : V;
}

// One token's vectors, 1 or 2, times all of S_0
MOE__K void MOE__(recur_read_one)(const recur_job *job, int n, float *y, int64_t y_stride) {
    const moe__recur_args *args = job->args;
    read_args t;
    t.stride = args->state_stride;
    t.y_stride = y_stride;
    t.ahead = moe__max(1, MOE__(RECUR_AHEAD) / args->n_v) * t.stride;
    for (int r = 0; r < args->n_k; r += MOE__(RECUR_ROWS)) {
        t.begins = r == 0;
        t.n_k = (int)moe__min(args->n_k - r, MOE__(RECUR_ROWS));
        for (int v = 0; v < n; v++) t.x[v] = job->x[v] + r;
        for (int c = 0; c < args->n_v; c += t.width) {
            MOE__(read_fn) *tile;
            t.width = MOE__(read_width)(args->n_v - c, n, &tile);
            t.state = args->state + r * t.stride + c;
            t.y = y + c;
            tile(&t);
        }
    }
}
// n vectors times `width` columns of S_0 from column `at` on; y: RECUR_BLOCK floats per vector
MOE__K void MOE__(recur_read)(const recur_job *job, int n, int at, int width, float *y) {
    const moe__recur_args *args = job->args;
    const int rows = attend_rows(n, MOE__(RECUR_VECTORS));
    read_args t;
    t.stride = args->state_stride;
    t.y_stride = MOE__(RECUR_BLOCK);
    t.begins = 1;
    t.ahead = 0;
    t.n_k = args->n_k;
    for (int c = 0; c < width; c += t.width)
        for (int i = 0; i < n; i += rows) {
            const int count = n - i < rows ? n - i : rows;
            MOE__(read_fn) *tile;
            memcpy(t.x, job->x + i, (size_t)count * sizeof *t.x);
            t.width = width - c < MOE__RECUR_COLUMNS * MOE__VFLOATS
                          ? (int)moe__min(width - c, MOE__VFLOATS)
                          : MOE__RECUR_COLUMNS * MOE__VFLOATS;
            tile = t.width > MOE__VFLOATS ? MOE__(read_full)[count - 1]
                                          : MOE__(read_part)[count - 1];
            t.state = args->state + at + c;
            t.y = y + c + i * t.y_stride;
            tile(&t);
        }
}

// Deltas and outputs of all tokens for some columns, of which y holds the sums: 4 vectors, or one
// or a part of it. Products of S_0's sums are fused into what they are taken from or added to, or
// rounded first, never as a compiler likes.
MOE__V void recur_tokens(const int columns, const recur_job *job, int at, int width,
                         const float *y, int64_t y_stride) {
    enum { V = MOE__VFLOATS };
    const moe__recur_args *args = job->args;
    const int n = columns > 1 ? V : width;
    for (int i = 0; i < args->n; i++) {
        const int p = args->done + i;
        const MOE__VF total = f_set(job->total[i]);
        const float *v = args->v + i * args->v_stride + at, *delta = args->deltas + at;
        float *out = args->out + i * args->out_stride + at;
        MOE__VF x[4], sum[4];
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++)
            if (c < columns) x[c] = f_load_n(v + c * V, n);
        if (args->beta) {
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++)
                if (c < columns) x[c] = f_fnma(total, f_load(y + c * V), x[c]);
            y += y_stride;
        }
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++)
            if (c < columns) sum[c] = f_rounded(f_mul(total, f_load(y + c * V)));
        y += y_stride;
        for (int j = 0; j < p; j++, delta += args->delta_stride) {
            const MOE__VF of_q = f_set(job->of_q[i][j]);
            const MOE__VF of_k = args->beta ? f_set(job->of_k[i][j]) : f_zero();
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++) {
                if (c >= columns) continue;
                const MOE__VF d = f_load_n(delta + c * V, n);
                sum[c] = f_fma(of_q, d, sum[c]);
                if (args->beta) x[c] = f_fnma(of_k, d, x[c]);
            }
        }
        const MOE__VF beta = f_set(args->beta ? args->beta[i * args->beta_stride] : 1);
        const MOE__VF own = f_set(job->of_q[i][p]);
        float *to = args->deltas + p * args->delta_stride + at;
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++) {
            if (c >= columns) continue;
            x[c] = f_rounded(f_mul(beta, x[c]));
            f_store_n(to + c * V, n, x[c]);
            f_store_n(out + c * V, n, f_fma(own, x[c], sum[c]));
        }
    }
}
MOE__K void MOE__(recur_columns)(const recur_job *job, int at, int width, const float *y,
                                 int64_t y_stride) {
    int c = 0;
    for (; c + 4 * MOE__VFLOATS <= width; c += 4 * MOE__VFLOATS)
        recur_tokens(4, job, at + c, 4 * MOE__VFLOATS, y + c, y_stride);
    for (; c < width; c += MOE__VFLOATS)
        recur_tokens(1, job, at + c, (int)moe__min(width - c, MOE__VFLOATS), y + c, y_stride);
}

MOE__K void MOE__(recur)(const moe__recur_args *args) {
    enum { BLOCK = MOE__(RECUR_BLOCK) };
    MOE__ALIGNED(64) float y[2 * MOE__CHUNK * BLOCK];
    recur_job job;
    job.args = args;
    if (args->n == 1) // meanwhile what is read first comes
        for (int r = 0; r < args->n_k && r * args->n_v < MOE__(RECUR_AHEAD); r++)
            for (int c = 0; c < args->n_v; c += 16)
                fetch_line(args->state + r * args->state_stride + c);
    MOE__(recur_keys)(args);
    const int n = MOE__(recur_prepare)(&job);
    if (args->n == 1) {
        const int64_t stride = (args->n_v + MOE__VFLOATS - 1) / MOE__VFLOATS * MOE__VFLOATS;
        float *sums = args->scratch + 2 * args->n_k;
        MOE__(recur_read_one)(&job, n, sums, stride);
        MOE__(recur_columns)(&job, 0, args->n_v, sums, stride);
        return;
    }
    for (int c = 0; c < args->n_v; c += BLOCK) {
        const int width = (int)moe__min(args->n_v - c, BLOCK);
        MOE__(recur_read)(&job, n, c, width, y);
        MOE__(recur_columns)(&job, c, width, y, BLOCK);
    }
}

typedef struct fold_args {
    const float *state, *deltas; // from the tile's first column on, and row
    float *to;
    int64_t stride, delta_stride;
    int32_t width;               // as in read_args
    const float *total;          // per row
    const float (*factor)[MOE__CHUNK]; // per row and delta
} fold_args;

MOE__V void fold_tile(const int n, const int columns, const fold_args *t) {
    enum { V = MOE__VFLOATS };
    MOE__VF acc[4][4], d[4];
    const int width = columns > 1 ? V : t->width;
    const float *delta = t->deltas;
    MOE__UNROLL(4)
    for (int r = 0; r < 4; r++)
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++)
            acc[r][c] = r < n && c < columns ? f_rounded(f_mul(f_set(t->total[r]),
                                                 f_load_n(t->state + r * t->stride + c * V, width)))
                                             : f_zero();
    for (int j = 0; j < MOE__CHUNK; j++, delta += t->delta_stride) {
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++)
            if (c < columns) d[c] = f_keep(f_load_n(delta + c * V, width));
        MOE__UNROLL(4)
        for (int r = 0; r < 4; r++) {
            if (r >= n) continue;
            const MOE__VF x = f_keep(f_set(t->factor[r][j]));
            MOE__UNROLL(4)
            for (int c = 0; c < 4; c++)
                if (c < columns) acc[r][c] = f_fma(x, d[c], acc[r][c]);
        }
    }
    MOE__UNROLL(4)
    for (int r = 0; r < 4; r++)
        MOE__UNROLL(4)
        for (int c = 0; c < 4; c++)
            if (r < n && c < columns)
                f_store_n(t->to + r * t->stride + c * V, width, acc[r][c]);
}
MOE__K void MOE__(fold_full_4)(const fold_args *t) { fold_tile(4, MOE__RECUR_COLUMNS, t); }
MOE__K void MOE__(fold_full_1)(const fold_args *t) { fold_tile(1, MOE__RECUR_COLUMNS, t); }
MOE__K void MOE__(fold_part_4)(const fold_args *t) { fold_tile(4, 1, t); }
MOE__K void MOE__(fold_part_1)(const fold_args *t) { fold_tile(1, 1, t); }

MOE__K void MOE__(fold)(const moe__recur_args *args, float *to) {
    enum { V = MOE__VFLOATS, FULL = MOE__RECUR_COLUMNS * V };
    MOE__ALIGNED(64) float factor[4][MOE__CHUNK], total[4];
    fold_args t;
    t.stride = args->state_stride;
    t.delta_stride = args->delta_stride;
    t.total = total;
    t.factor = (const float (*)[MOE__CHUNK])factor;
    for (int r = 0, n; r < args->n_k; r += n) {
        n = args->n_k - r < 4 ? 1 : 4;
        for (int i = 0; i < n; i++) {
            total[i] = args->total[args->n_decay > 1 ? r + i : 0];
            for (int j = 0; j < MOE__CHUNK; j += V)
                f_store(factor[i] + j, f_mul(f_load(args->weights + j),
                                             f_load(args->keys + (r + i) * MOE__CHUNK + j)));
        }
        for (int c = 0; c < args->n_v; c += t.width) {
            const int left = args->n_v - c, full = left >= FULL;
            t.width = full ? FULL : left < V ? left : V;
            t.state = args->state + r * t.stride + c;
            t.deltas = args->deltas + c;
            t.to = to + r * t.stride + c;
            if (full)
                n == 4 ? MOE__(fold_full_4)(&t) : MOE__(fold_full_1)(&t);
            else
                n == 4 ? MOE__(fold_part_4)(&t) : MOE__(fold_part_1)(&t);
        }
    }
}

// Lanes are channels.
MOE__K void MOE__(scan)(const float *state, float *to, int64_t stride, int64_t n_state, int64_t n,
                        const float *dt, const float *x, const float *a, const float *b,
                        const float *c, float *out) {
    for (int64_t j = 0; j < n; j += MOE__VFLOATS) {
        const int64_t left = n - j;
        const MOE__VF step = f_load_n(dt + j, left), in = f_mul(step, f_load_n(x + j, left));
        MOE__VF sum = f_zero();
        for (int64_t i = 0; i < n_state; i++) {
            const int64_t at = i * stride + j;
            const MOE__VF decay = f_exp(f_mul(step, f_load_n(a + at, left)));
            const MOE__VF s = f_fma(decay, f_load_n(state + at, left),
                                    f_rounded(f_mul(in, f_set(b[i]))));
            f_store_n(to + at, left, s);
            sum = f_fma(s, f_set(c[i]), sum);
        }
        f_store_n(out + j, left, sum);
    }
}

MOE__K void MOE__(conv)(const float *const *x, const float *w, int64_t stride, int32_t n_taps,
                        const float *bias, int64_t n, int silu, float *out) {
    for (int64_t c = 0; c < n; c += MOE__VFLOATS) {
        const int64_t left = n - c;
        MOE__VF sum = bias ? f_load_n(bias + c, left) : f_zero();
        for (int i = 0; i < n_taps; i++)
            sum = f_fma(f_load_n(w + i * stride + c, left), f_load_n(x[i] + c, left), sum);
        f_store_n(out + c, left, silu ? f_gate(sum, sum) : sum);
    }
}

#undef MOE__ATTEND_ROWS
#undef MOE__ATTEND_WIDE
#undef MOE__ATTEND_FEW
#undef MOE__RECUR_COLUMNS
#undef MOE__VD
#undef MOE__VD_OP
#endif // MOE__ISA != 4

// ---- the table of this instruction set -------------------------------------------------------

// Floats have no int8 products. Interleaved rows are made floats by plain C.
#define MOE__TILE_F32(name) MOE__SHARED(tile_##name)
#define MOE__TILE_Q32(name) MOE__(tile_##name)
#define MOE__TILE_Q256(name) MOE__(tile_##name)
#define MOE__FLOATS_1(name) MOE__AVX2(dequantize_##name)
#define MOE__FLOATS_4(name) moe__dequantize_##name
#define MOE__FLOATS_8(name) moe__dequantize_##name
#define MOE__TYPE_KERNELS(NAME, name, id, block, bytes, act, rows, ...) \
    {MOE__SHARED(dot_##name), MOE__TILE_##act(name), MOE__FLOATS_##rows(name)},
static const moe__kernels MOE__(kernels) = {
    (moe_isa)MOE__ISA,
    {MOE__TYPES(MOE__TYPE_KERNELS)},
    {MOE__SHARED(quantize_f32), MOE__SHARED(quantize_q32), MOE__SHARED(quantize_q256)},
    MOE__SHARED(rms_norm),
    MOE__SHARED(swiglu),
    MOE__SHARED(swiglu_oai),
    MOE__SHARED(softmax),
    MOE__SHARED(weigh),
    MOE__SHARED(peaks),
    MOE__SHARED(axpy),
    MOE__SHARED(divide),
    MOE__SHARED(f32_to_f16),
    MOE__SHARED(f32_to_q8_0),
    MOE__SHARED(attend),
    MOE__SHARED(attend_add),
    MOE__SHARED(recur),
    MOE__SHARED(fold),
    MOE__SHARED(scan),
    MOE__SHARED(conv),
    MOE__SHARED(gate),
    MOE__SHARED(softplus),
    MOE__SHARED(decay),
    MOE__SHARED(relu_squared),
    MOE__SHARED(swiglu_limited)};

#undef MOE__TYPE_KERNELS
#undef MOE__TILE_F32
#undef MOE__TILE_Q32
#undef MOE__TILE_Q256
#undef MOE__FLOATS_1
#undef MOE__FLOATS_4
#undef MOE__FLOATS_8
#undef v_load_128
#undef v_load
#undef v_load_256
#undef v_zero
#undef v_set8
#undef v_set16
#undef v_and
#undef v_or
#undef v_xor
#undef v_or_and
#undef v_lanes
#undef v_dot_u8
#undef v_dot_i16
#undef v_load16
#undef v_peak
#undef v_act_scale
#undef v_act_round
#undef v_act_pack
#undef v_load_weights
#undef v_store
#undef v_add_where
#undef v_e8m0
#undef v_turn_lanes
#undef v_group
#undef v_acts
#undef v_numbers
#undef v_spread
#undef v_twos
#undef v_quads
#undef v_multiply
#undef v_extend
#undef v_shift
#undef v_field
#undef v_mask
#undef v_join
#undef v_table
#undef v_lookup
#undef v_book8
#undef v_signed
#undef v_lookup_16
#undef v_book4
#undef v_book4_16
#undef v_dwords
#undef v_acts_r4
#undef v_bits_r4
#undef v_load_twice
#undef v_scales_r4
#undef v_pairs_r4
#undef v_times_sums_r4
#undef v_multiply_r4
#undef v_shift_r4
#undef v_acts_r8
#undef v_hadd
#undef u_set8
#undef u_set16
#undef u_f16
#undef u_sum
#undef u_load_weights
#undef u_load_weight
#undef u_dot_end
#undef u_dot_float
#undef u_store_levels
#undef u_store
#undef u_dequantize_float
#undef u_or_and
#undef u_copy_i16
#undef u_nibbles
#undef u_mask
#undef u_act32
#undef u_rounded
#undef u_times_sums
#undef u_words
#undef u_halves
#undef u_nibbles16
#undef u_bits16
#undef u_pairs16
#undef u_add16
#undef u_odd16
#undef u_signs_book8
#undef u_even_signs
#undef u_signs_scales
#undef u_store_indices
#undef u_indices
#undef u_fours16
#undef u_signs_book4
#undef u_rows_8
#undef u_rows_4
#undef u_add_block
#undef u_row_scale
#undef u_per_16
#undef u_four_halves
#undef u_mask8
#undef u_add8
#undef u_bits_r4
#undef u_odd_signed
#undef u_scales_rows
#undef u_dot_i16
#undef u_ue4m3
#undef u_put
#undef f_rounded
#undef f_scale
#undef f_min
#undef f_mask
#undef f_load_part
#undef f_load
#undef f_store_part
#undef f_store
#undef f_select_part
#undef f_load_half
#undef f_load_half_part
#undef f_to_half
#undef f_store_half
#undef f_store_half_part
#undef f_load_i8
#undef f_store_i8
#undef f_set_half
#undef f_set
#undef f_round
#undef f_low
#undef f_high
#undef f_upper
#undef f_first
#undef f_at_least
#undef f_fold
#undef f_fold_max
#undef f_keep
#undef f_zero
#undef f_add
#undef f_sub
#undef f_mul
#undef f_div
#undef f_fma
#undef f_fnma
#undef f_max
#undef f_sum
#undef f_largest
#undef f_sum4
#undef f_exp
#undef f_glu
#undef f_gate
#undef f_softplus
#undef f_load_n
#undef f_store_n
#undef d_weigh
#undef d_above
#undef d_scale
#undef d_fold
#undef d_zero
#undef d_add
#undef d_square_add
#undef d_sum
#undef d_set
#undef d_sub
#undef d_product
#undef d_step
#undef fetch_ahead
#undef fetch_line
#undef fetch_line_far
#undef fetch_stream
#undef q32_size
#undef q32_shift
#undef q32_block
#undef q32_load
#undef q32_fifths
#undef q32_levels
#undef unpack_fn
#undef rows_head
#undef r4_t
#undef r4_half
#undef rows_out
#undef rows_put
#undef level_iq4_xs_r8
#undef TILE_PACK
#undef TILE_SUMS_AT
#undef TILE_SCALE
#undef TILE_D
#undef TILE_DMIN
#undef TILE_MIN
#undef TILE_START
#undef tile_put
#undef tile_put_scale
#undef tile_put_int
#undef tile_job
#undef tile_kernel_fn
#undef tile_dot
#undef tile_end
#undef tile_even
#undef tile_odd
#undef tile_dot_i16
#undef tile_columns
#undef tile_pair
#undef tile_turn
#undef tile_low
#undef tile_high_nibbles
#undef tile_plan
#undef tile_turn_blocks
#undef tile_ahead
#undef tile_cut
#undef ATTEND_STEP
#undef ATTEND_TURNED
#undef kv_load
#undef kv_load_part
#undef attend_rows
#undef attend_most
#undef attend_least
#undef attend_stream
#undef attend_chunk
#undef score_args
#undef score_tile
#undef block_args
#undef block_tile
#undef attend_joined
#undef attend_out
#undef value_args
#undef value_load
#undef value_weight
#undef value_tile
#undef value_cut
#undef recur_job
#undef recur_tokens
#undef read_args
#undef read_tile
#undef fold_args
#undef fold_tile
#undef v_level_of
#undef MOE__LEVELS
#undef MOE__BIAS8
#undef MOE__SUB_LEVELS
#undef MOE__UNITS
#undef MOE__SHARED
#undef MOE__AVX2
#undef MOE__VNNI
#undef MOE__LANES
#undef MOE__VFLOATS
#undef MOE__VBYTES
#undef MOE__MM
#undef MOE__VF
#undef MOE__VI
#undef MOE__UNROLL_
#undef MOE__UNROLL
#undef MOE__V
#undef MOE__K
#undef MOE__QUIET
#undef MOE__TARGET
#undef MOE__
#undef MOE__PASTE
#undef MOE__SUFFIX
#undef MOE__PASTE_
#endif // MOE__ISA

#if !defined(MOE__ISA) && defined(MOE__IMPLEMENT) && !defined(MOE__IMPLEMENTED)
#define MOE__IMPLEMENTED

// ---- picking a table -------------------------------------------------------------------------

#if MOE__X86
// What the processor, the operating system and this build can do: a bit per moe_isa.
static unsigned moe__kernels_detect(void) {
    unsigned a, b, c, d, low, high, found = 1u << MOE_ISA_SCALAR;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const unsigned osxsave = 1u << 27, fma = 1u << 12, f16c = 1u << 29, avx = 1u << 28;
    if ((c & (osxsave | fma | f16c | avx)) != (osxsave | fma | f16c | avx)) return found;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6) return found; // the system does not save ymm registers
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & 1u << 5)) return found;
    found |= 1u << MOE_ISA_AVX2;
    const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;
    const int avx512 = (low & 0xE0) == 0xE0 && (b & f_dq_bw_vl) == f_dq_bw_vl && (c & vnni);
    const unsigned more = a ? 1 : 0; // number of the last subleaf
    if (avx512 && MOE__USE_AVX512) found |= 1u << MOE_ISA_AVX512;
    const int avx_vnni = more && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
    if (MOE__USE_AVX_VNNI && (MOE__VNNI_EVEX ? avx512 : avx_vnni)) found |= 1u << MOE_ISA_AVX_VNNI;
    return found;
}
#else
static unsigned moe__kernels_detect(void) { return 1u << MOE_ISA_SCALAR; }
#endif

MOE_API moe_isa moe_isa_resolve(moe_isa isa) {
    static const moe_isa order[] = {MOE_ISA_AVX512, MOE_ISA_AVX_VNNI, MOE_ISA_AVX2,
                                    MOE_ISA_SCALAR};
    const unsigned found = moe__kernels_detect();
    int i = 0, known = isa >= MOE_ISA_SCALAR && isa <= MOE_ISA_AVX_VNNI;
    while (known && order[i] != isa) i++;
    while (!(found >> order[i] & 1)) i++;
    return order[i];
}

MOE_API const char *moe_isa_name(moe_isa isa) {
    switch (isa) {
    case MOE_ISA_BEST: return "best";
    case MOE_ISA_SCALAR: return "scalar";
    case MOE_ISA_AVX2: return "AVX2";
    case MOE_ISA_AVX512: return "AVX-512";
    case MOE_ISA_AVX_VNNI: return "AVX-VNNI";
    }
    return "?";
}

static const moe__kernels *moe__kernels_get(moe_isa isa) {
#if MOE__X86
    switch (moe_isa_resolve(isa)) {
#if MOE__USE_AVX512
    case MOE_ISA_AVX512: return &moe__kernels_avx512;
#endif
#if MOE__USE_AVX_VNNI
    case MOE_ISA_AVX_VNNI: return &moe__kernels_avx_vnni;
#endif
    case MOE_ISA_AVX2: return &moe__kernels_avx2;
    default: break;
    }
#else
    (void)isa;
#endif
    return &moe__kernels_scalar;
}

// ==============================================================================================
// >>ops
//
// What a forward pass is made of: matrices times activations, and rotary positions. All of it
// works on ranges, so that callers decide how threads share the work; nothing here waits for
// other threads or allocates.
//
// A matrix {n_in, n_out} is n_out rows of n_in weights, as GGUF lists its dimensions: y = W x has
// one dot product per row. Weights stay quantized in the file's mapping. It is the activations x
// that are quantized, too, to int8 and once per vector, so that a dot product is one of integers
// (moe__act_kind in >>types): a vector is therefore kept in every form that some matrix wants.
// ==============================================================================================

// What matrices read. Each has one of these vectors for its input; from that follow the forms in
// which the vector is wanted (moe__acts), and nobody can hand a matrix another one.
typedef enum moe__input {
    MOE__IN_NORMED, // the residual, normed
    MOE__IN_MIXED,  // what a mixer has made of it, before attn_output
    MOE__IN_ROUTED, // hidden vectors of routed experts,
    MOE__IN_SHARED, // of shared ones,
    MOE__IN_DENSE,  // of layers without experts
    MOE__IN_Q_A,    // latent attention: low-rank queries,
    MOE__IN_Q_NOPE, // unrotated parts of queries by head,
    MOE__IN_LATENT, // weighted sums of latent vectors by head
    MOE__INPUTS,
    MOE__IN_NONE = MOE__INPUTS // rows are read as floats, or parts of them are matrices
} moe__input;

// Matrix {n_in, n_out}, or {n_in, n_out, n_expert} with one matrix per expert.
typedef struct moe__matrix {
    const uint8_t *data;  // NULL: the model has no such tensor
    moe__input input;
    const moe__type *type;
    int index;            // of the type in kernel tables
    int64_t n_in, n_out, n_expert;
    size_t row_size;      // bytes of a row
    size_t expert_size;   // bytes from one expert's matrix to the next
    const uint8_t *const *experts; // NULL, or where each of them lies
    const float *scale;   // factor of the product, one per expert; NULL: 1
    const float *bias;    // added to the product, n_out values per expert; NULL: 0
    int64_t bias_stride;  // from one expert's bias to the next
} moe__matrix;

// Activation vectors in every form that the matrices reading them want.
typedef struct moe__acts {
    int64_t n;                     // values per vector
    unsigned kinds;                // bit set of moe__act_kind
    size_t size[MOE__ACT_KINDS];   // bytes per vector
    uint8_t *data[MOE__ACT_KINDS]; // [MOE__ACT_F32] is the source of the others
} moe__acts;

enum { MOE__ACTS_FLOATS = 1 << MOE__ACT_F32 };

MOE__INLINE float *moe__acts_f32(const moe__acts *acts, int64_t row) {
    return (float *)acts->data[MOE__ACT_F32] + row * acts->n;
}
MOE__INLINE const void *moe__acts_row(const moe__acts *acts, moe__act_kind kind, int64_t row) {
    return acts->data[kind] + (size_t)row * acts->size[kind];
}

// Room for n_rows vectors of n values, in the given forms.
MOE__PRIVATE void moe__acts_take(moe__acts *acts, moe__arena *arena, int64_t n_rows, int64_t n,
                                 unsigned kinds) {
    acts->n = n;
    acts->kinds = kinds;
    for (int kind = 0; kind < MOE__ACT_KINDS; kind++) {
        acts->size[kind] = moe__act_size((moe__act_kind)kind, n);
        acts->data[kind] = NULL;
        if (kinds >> kind & 1)
            acts->data[kind] =
                (uint8_t *)moe__arena_take(arena, (uint64_t)n_rows, acts->size[kind]);
    }
}

// The same memory for vectors of n values, no more than it was taken for.
MOE__INLINE void moe__acts_fit(moe__acts *acts, int64_t n) {
    if (acts->n == n) return;
    acts->n = n;
    for (int kind = 0; kind < MOE__ACT_KINDS; kind++)
        acts->size[kind] = moe__act_size((moe__act_kind)kind, n);
}

// Makes the int8 forms of rows begin <= row < end from their floats.
MOE__PRIVATE void moe__acts_quantize(const moe__kernels *kernels, const moe__acts *acts,
                                     int64_t begin, int64_t end) {
    for (int kind = MOE__ACT_F32 + 1; kind < MOE__ACT_KINDS; kind++) {
        if (!(acts->kinds >> kind & 1)) continue;
        for (int64_t row = begin; row < end; row++)
            kernels->quantize[kind](moe__acts_f32(acts, row), acts->n,
                                    acts->data[kind] + (size_t)row * acts->size[kind]);
    }
}

// Pointers to vectors rows[i], or first + i if rows is NULL, of the matrix' input, in the form
// that it reads. in: [MOE__INPUTS]
MOE__PRIVATE void moe__acts_gather(const moe__acts *in, const moe__matrix *matrix,
                                   const int32_t *rows, int64_t first, int64_t n,
                                   const void **x) {
    const moe__acts *acts = &in[matrix->input];
    MOE_ASSERT(matrix->input < MOE__INPUTS && (acts->kinds >> matrix->type->act & 1));
    for (int64_t i = 0; i < n; i++)
        x[i] = moe__acts_row(acts, matrix->type->act, rows ? rows[i] : first + i);
}

// ---- matrix times activations ---------------------------------------------------------------

// Rows that are read next, to be prefetched.
typedef struct moe__next {
    const uint8_t *data;
    size_t size;
} moe__next;

MOE__INLINE const uint8_t *moe__matrix_row(const moe__matrix *matrix, int32_t expert,
                                           int64_t row) {
    const uint8_t *first = matrix->experts ? matrix->experts[expert]
                                           : matrix->data + (size_t)expert * matrix->expert_size;
    return first + (size_t)row * matrix->row_size;
}

MOE__INLINE moe__next moe__next_tile(const moe__matrix *matrix, int32_t expert, int64_t row,
                                     int64_t end) {
    moe__next next;
    next.data = row < end ? moe__matrix_row(matrix, expert, row) : NULL;
    next.size = (size_t)moe__max(0, moe__min(end - row, MOE__TILE_ROWS)) * matrix->row_size;
    return next;
}

// Rows begin .. begin + n - 1 as floats, times the scale: whole groups of interleaved types.
MOE__PRIVATE void moe__matrix_to_f32(const moe__kernels *kernels, const moe__matrix *matrix,
                                     int32_t expert, int64_t begin, int64_t n, float *out) {
    for (int64_t r = 0; r < n; r += matrix->type->rows)
        kernels->type[matrix->index].dequantize(moe__matrix_row(matrix, expert, begin + r),
                                                matrix->n_in, out + r * matrix->n_in);
    for (int64_t i = 0; i < n * matrix->n_in && matrix->scale; i++)
        out[i] *= matrix->scale[expert];
}

// Scale and bias of rows begin .. begin + n_rows - 1, which few models have.
MOE__PRIVATE void moe__matmul_finish(const moe__matrix *matrix, int32_t expert, int64_t begin,
                                     int64_t n_rows, float *out) {
    if (matrix->scale)
        for (int64_t r = 0; r < n_rows; r++) out[r] *= matrix->scale[expert];
    if (matrix->bias)
        for (int64_t r = 0; r < n_rows; r++)
            out[r] += matrix->bias[expert * matrix->bias_stride + begin + r];
}

// out[t * out_stride + r] = row (begin + r) of one expert's matrix . x[t], for at most
// MOE__TILE_ROWS rows. A token has the same bits alone and among others.
MOE__PRIVATE void moe__matmul_tile(const moe__kernels *kernels, const moe__matrix *matrix,
                                   int32_t expert, int64_t begin, int64_t n_rows,
                                   const void *const *x, int64_t n_tokens, float *out,
                                   int64_t out_stride, void *pack, moe__next next) {
    const moe__type_kernels *k = &kernels->type[matrix->index];
    const uint8_t *rows = moe__matrix_row(matrix, expert, begin);
    if (n_tokens == 1)
        k->dot(rows, matrix->row_size, n_rows, matrix->n_in, x[0], out);
    else
        k->tile(rows, matrix->row_size, n_rows, matrix->n_in, x, n_tokens, out, out_stride, pack,
                next.data, next.size);
    if (matrix->scale || matrix->bias)
        for (int64_t t = 0; t < n_tokens; t++)
            moe__matmul_finish(matrix, expert, begin, n_rows, out + t * out_stride);
}

// The same for all rows with begin + r < end. A row's result has the same bits in whatever range
// it is computed.
MOE__PRIVATE void moe__matmul(const moe__kernels *kernels, const moe__matrix *matrix,
                              int32_t expert, int64_t begin, int64_t end, const void *const *x,
                              int64_t n_tokens, float *out, int64_t out_stride, void *pack) {
    if (n_tokens == 1) { // nothing to share between tokens: one long run
        if (begin >= end) return;
        kernels->type[matrix->index].dot(moe__matrix_row(matrix, expert, begin),
                                         matrix->row_size, end - begin, matrix->n_in, x[0], out);
        moe__matmul_finish(matrix, expert, begin, end - begin, out);
        return;
    }
    for (int64_t row = begin; row < end; row += MOE__TILE_ROWS)
        moe__matmul_tile(kernels, matrix, expert, row, moe__min(end - row, MOE__TILE_ROWS), x,
                         n_tokens, out + (row - begin), out_stride, pack,
                         moe__next_tile(matrix, expert, row + MOE__TILE_ROWS, end));
}

// y[rows[t]] += weights[t] * (W x[t]) for rows begin .. end - 1 of W; y has W's n_out columns.
// rows NULL: t. weights NULL: 1. tile: n_tokens * MOE__TILE_ROWS, at least end - begin, floats.
MOE__PRIVATE void moe__matmul_add(const moe__kernels *kernels, const moe__matrix *matrix,
                                  int32_t expert, int64_t begin, int64_t end,
                                  const void *const *x, int64_t n_tokens, const int32_t *rows,
                                  const float *weights, float *y, float *tile, void *pack) {
    const int64_t step = n_tokens == 1 ? end - begin : (int64_t)MOE__TILE_ROWS;
    for (int64_t row = begin; row < end; row += step) {
        int64_t n_rows = moe__min(end - row, step);
        if (n_tokens == 1)
            moe__matmul(kernels, matrix, expert, row, end, x, 1, tile, 0, pack);
        else
            moe__matmul_tile(kernels, matrix, expert, row, n_rows, x, n_tokens, tile,
                             MOE__TILE_ROWS, pack,
                             moe__next_tile(matrix, expert, row + n_rows, end));
        for (int64_t t = 0; t < n_tokens; t++)
            kernels->axpy(weights ? weights[t] : 1.0f, tile + t * MOE__TILE_ROWS, n_rows,
                          y + (rows ? rows[t] : t) * matrix->n_out + row);
    }
}

// ---- rotary positions -----------------------------------------------------------------------

typedef enum moe__rope_kind { MOE__ROPE_NORM, MOE__ROPE_NEOX } moe__rope_kind;

typedef struct moe__rope {
    moe__rope_kind kind;
    int32_t n_rot;    // values turned, from the first; even
    int32_t table_at; // where its floats begin in a row's tables of all ropes
    double *frequency; // n_rot / 2 angles per position
    double magnitude; // factor of cos and sin (YaRN)
} moe__rope;

// cos and sin of position p: table[2 i], table[2 i + 1] for pair i.
MOE__PRIVATE void moe__rope_table(const moe__rope *rope, int64_t position, float *table) {
    for (int i = 0; i < rope->n_rot / 2; i++) {
        double angle = (double)position * rope->frequency[i];
        table[2 * i] = (float)(cos(angle) * rope->magnitude);
        table[2 * i + 1] = (float)(sin(angle) * rope->magnitude);
    }
}

// Turns pairs (2i, 2i+1) (NORM) or (i, i + n_rot/2) (NEOX) of x in place.
MOE__PRIVATE void moe__rope_apply(const moe__rope *rope, const float *table, float *x) {
    int half = rope->n_rot / 2;
    int step = rope->kind == MOE__ROPE_NORM ? 2 : 1, distance = step == 2 ? 1 : half;
    for (int i = 0; i < half; i++) {
        float *a = x + i * step, *b = a + distance, x0 = *a, x1 = *b;
        *a = x0 * table[2 * i] - x1 * table[2 * i + 1];
        *b = x0 * table[2 * i + 1] + x1 * table[2 * i];
    }
}

// Frequencies base^(-2i/n_rot), slowed down by `factor` (linear), or as YaRN does it (Peng et
// al., 2023): fast dimensions keep their speed, slow ones are slowed, with a ramp between.
typedef struct moe__rope_scaling {
    int yarn;
    double base, factor, original_ctx, beta_fast, beta_slow, ext_factor;
} moe__rope_scaling;

MOE__PRIVATE void moe__rope_init(moe__rope *rope, const moe__rope_scaling *s) {
    const double pi = 3.14159265358979323846;
    int n = rope->n_rot;
    double low = 0, high = 0;
    if (s->yarn) {
        low = n * log(s->original_ctx / (s->beta_fast * 2 * pi)) / (2 * log(s->base));
        high = n * log(s->original_ctx / (s->beta_slow * 2 * pi)) / (2 * log(s->base));
        low = fmax(0, floor(low));
        high = fmin(n - 1, ceil(high));
    }
    for (int i = 0; i < n / 2; i++) {
        double fast = pow(s->base, -2.0 * i / n), slow = fast / s->factor, ramp = 0;
        if (s->yarn)
            ramp = s->ext_factor * (1 - fmin(1, fmax(0, (i - low) / fmax(0.001, high - low))));
        rope->frequency[i] = slow * (1 - ramp) + fast * ramp;
    }
}

// ==============================================================================================
// >>experts
//
// The heart of the library: which experts see which tokens, and how threads share their work.
//
//   router      token -> its n_used experts and their weights
//   dispatch    experts -> their tokens: one entry per active expert; shared experts (and the
//               feed-forward net of a dense layer) are entries that see all tokens, with weight
//               1 or their gate's
//   schedule    (entries, rows, threads) -> the row ranges of each thread
//   gate_up     hidden = silu(gate x) * up x, or another activation, for this thread's ranges
//   down        residual += weight * (down hidden) for the ranges of this thread
//
// Why the dispatch turns the router's list around: a batch of 512 tokens that choose 8 of 128
// experts asks for 4,096 products of a token with an expert, but each expert's matrices need to
// be read and unpacked only once, for the 32 tokens or so that chose it. For one token the entries
// are its n_used experts with a token each, and reading their matrices is all the work there is.
//
// Sums over experts are taken in the order of the entries, experts ascending, shared ones last,
// whoever computes them: floats added up in another order would have other bits. That is what
// makes schedules interchangeable.
// ==============================================================================================

// ---- router ----------------------------------------------------------------------------------

enum { MOE__MAX_EXPERTS = 512 };

// From logits to the scores that experts are chosen by and weighed with; ids of the key
// expert_gating_func.
typedef enum moe__gating {
    MOE__GATING_SOFTMAX = 1,
    MOE__GATING_SIGMOID = 2,
    MOE__GATING_CHOSEN = 3 // softmax over the chosen experts only
} moe__gating;

typedef struct moe__router {
    moe__gating gating;
    int32_t n_expert, n_used;
    int32_t n_group, n_group_used; // n_group <= 1: no groups
    int normalize;                 // weights of the chosen experts sum to 1
    float scale;                   // factor of all weights
} moe__router;

// The unused entry with the largest score, the first among equals; NaN loses unless all are NaN.
MOE__PRIVATE int32_t moe__router_best(const float *score, const uint8_t *used, int32_t n) {
    int32_t best = -1;
    for (int32_t e = 0; e < n; e++)
        if (!used[e] && (best < 0 || score[e] > score[best] || score[best] != score[best]))
            best = e;
    return best;
}

// Marks the experts of all but the n_group_used best groups as used; a group is as good as the
// sum of its two largest scores (DeepSeek-V3 report, 2.1.2).
MOE__PRIVATE void moe__router_groups(const moe__router *router, const float *score,
                                     uint8_t *used) {
    int32_t size = router->n_expert / router->n_group;
    float group_score[MOE__MAX_EXPERTS];
    uint8_t kept[MOE__MAX_EXPERTS];
    for (int32_t g = 0; g < router->n_group; g++) {
        const float *s = score + g * size;
        float first = -INFINITY, second = -INFINITY;
        for (int32_t i = 0; i < size; i++) {
            if (s[i] > first) {
                second = first;
                first = s[i];
            } else if (s[i] > second) {
                second = s[i];
            }
        }
        group_score[g] = size > 1 ? first + second : first;
        kept[g] = 0;
    }
    for (int32_t i = 0; i < router->n_group_used; i++)
        kept[moe__router_best(group_score, kept, router->n_group)] = 1;
    for (int32_t e = 0; e < router->n_expert; e++)
        if (!kept[e / size]) used[e] = 1;
}

// From the router's logits (overwritten) the n_used experts, ascending, and their weights. With
// p = softmax or sigmoid of the logits, experts are the n_used largest of p + bias within the best
// groups, weights are p of these, divided by their sum if `normalize` says so, times `scale`.
//
// bias [n_expert] (or NULL) is added for choosing only: DeepSeek-V3 steers the load of its experts
// by it in training without touching what they contribute (its report, 2.1.2). Experts are kept
// ascending, not by score, since sums over them are taken in this order. NaN logits still give
// distinct experts in range.
MOE__PRIVATE void moe__router_select(const moe__kernels *kernels, const moe__router *router,
                                     float *logits, const float *bias, int32_t *experts,
                                     float *weights) {
    float score[MOE__MAX_EXPERTS];
    uint8_t used[MOE__MAX_EXPERTS];
    const int32_t n = router->n_expert;
    if (router->gating == MOE__GATING_SOFTMAX)
        kernels->softmax(logits, n);
    else if (router->gating == MOE__GATING_SIGMOID)
        for (int32_t e = 0; e < n; e++) logits[e] = 1.0f / (1.0f + expf(-logits[e]));
    for (int32_t e = 0; e < n; e++) {
        score[e] = logits[e] + (bias ? bias[e] : 0.0f);
        used[e] = 0;
    }
    if (router->n_group > 1) moe__router_groups(router, score, used);
    float sum = 0;
    for (int32_t i = 0; i < router->n_used; i++) {
        int32_t e = moe__router_best(score, used, n);
        used[e] = 1;
        sum += logits[e];
        int32_t at = i; // keep the list ascending
        for (; at > 0 && experts[at - 1] > e; at--) experts[at] = experts[at - 1];
        experts[at] = e;
    }
    for (int32_t i = 0; i < router->n_used; i++) weights[i] = logits[experts[i]];
    float factor = router->scale;
    if (router->gating == MOE__GATING_CHOSEN)
        kernels->softmax(weights, router->n_used);
    else if (router->normalize)
        factor /= fmaxf(sum, 6.103515625e-5f); // llama.cpp's guard, 2^-14
    for (int32_t i = 0; i < router->n_used; i++) weights[i] *= factor;
}

// ---- dispatch --------------------------------------------------------------------------------

// down(silu(gate x) * up x): one per expert, or one for all tokens.
typedef struct moe__ffn {
    moe__matrix gate, up, down;
    int oai; // gpt-oss' activation in place of silu, see moe__kernels
} moe__ffn;

// One expert and the tokens that chose it: rows of the batch, ascending. Its hidden vectors (n_ff
// values each) follow one another behind those of the experts before it.
typedef struct moe__entry {
    const moe__ffn *ffn;
    int32_t expert;         // which matrix of ffn; 0 if it has one
    int32_t n_tokens;
    const int32_t *tokens;  // rows of the input and of the residual
    const float *weights;   // per token
    int64_t hidden_row;     // the first of its hidden vectors, one per token
    int64_t cost_before;    // moe__entry_cost of all entries before
} moe__entry;

// The entries of one layer. Every thread makes its own, so that none waits for it.
typedef struct moe__dispatch {
    moe__entry *entries; // room for n_expert + 1
    int32_t n_entries;
    int32_t n_routed;    // the first of them; the others see all tokens
    int32_t *tokens;     // of the routed experts, entry after entry
    float *weights;
} moe__dispatch;

// What a block of rows costs: a multiplication per token, and unpacking, which takes as long as
// some tokens do.
MOE__INLINE int64_t moe__entry_block_cost(const moe__entry *entry) { return entry->n_tokens + 6; }
// What gate and up of an entry cost: blocks of MOE__TILE_ROWS rows
MOE__INLINE int64_t moe__entry_blocks(const moe__entry *entry) {
    return (entry->ffn->gate.n_out + MOE__TILE_ROWS - 1) / MOE__TILE_ROWS;
}
MOE__INLINE int64_t moe__entry_cost(const moe__entry *entry) {
    return moe__entry_blocks(entry) * moe__entry_block_cost(entry);
}

// The next entry, of n_tokens tokens.
MOE__PRIVATE moe__entry *moe__dispatch_add(moe__dispatch *dispatch, const moe__ffn *ffn,
                                           int32_t n_tokens) {
    moe__entry *entry = &dispatch->entries[dispatch->n_entries];
    entry->ffn = ffn;
    entry->n_tokens = n_tokens;
    entry->cost_before =
        dispatch->n_entries++ ? entry[-1].cost_before + moe__entry_cost(entry - 1) : 0;
    return entry;
}

// Entries of the routed experts. experts, weights: n_tokens x n_used from the router. A counting
// sort: tokens of each expert counted, experts laid out one behind the other, tokens put there.
MOE__PRIVATE void moe__dispatch_routed(moe__dispatch *dispatch, const moe__ffn *ffn,
                                       const moe__router *router, const int32_t *experts,
                                       const float *weights, int64_t n_tokens) {
    int32_t count[MOE__MAX_EXPERTS], first[MOE__MAX_EXPERTS];
    const int64_t n_slots = n_tokens * router->n_used;
    memset(count, 0, sizeof count);
    for (int64_t i = 0; i < n_slots; i++) count[experts[i]]++;
    int32_t next = 0;
    for (int32_t e = 0; e < router->n_expert; e++) {
        first[e] = next;
        next += count[e];
        if (!count[e]) continue;
        moe__entry *entry = moe__dispatch_add(dispatch, ffn, count[e]);
        entry->expert = e;
        entry->tokens = dispatch->tokens + first[e];
        entry->weights = dispatch->weights + first[e];
        entry->hidden_row = first[e];
    }
    dispatch->n_routed = dispatch->n_entries;
    for (int64_t i = 0; i < n_slots; i++) {
        int32_t at = first[experts[i]]++;
        dispatch->tokens[at] = (int32_t)(i / router->n_used);
        dispatch->weights[at] = weights[i];
    }
}

// One entry for all tokens. tokens: 0, 1, 2, ...; weights: one per token
MOE__PRIVATE void moe__dispatch_all(moe__dispatch *dispatch, const moe__ffn *ffn, int64_t n_tokens,
                                    const int32_t *tokens, const float *weights) {
    moe__entry *entry = moe__dispatch_add(dispatch, ffn, (int32_t)n_tokens);
    entry->expert = 0;
    entry->tokens = tokens;
    entry->weights = weights;
    entry->hidden_row = 0;
}

// ---- schedules -------------------------------------------------------------------------------

// A schedule says which rows of which entries a thread computes, first of gate and up, then of
// down. It is a pure function of what is to be done, the thread's number and how many there are:
// each thread asks it for its own ranges and nobody hands out work while it is done. A queue would
// balance better for a moment, but rows would move between threads from token to token, and with
// them between the caches and memory nodes of cores.
//
// Rows are dealt in units: MOE__ROW_UNIT rows for one token, half a tile for many, or as many as
// the type interleaves.

// What a schedule decides from; nothing else may matter.
typedef struct moe__task {
    const moe__entry *entries;
    int32_t n_entries;
    int32_t n_routed; // the first entries are routed experts, the others see all tokens
    int one_token;    // of a batch of one token
    int down;         // rows are those of down, else those of gate and up
    int64_t unit;     // row ranges begin at multiples of this
    const moe__nodes *nodes; // memory nodes of the threads
} moe__task;

typedef struct moe__range {
    int32_t entry;
    int64_t begin, end; // rows; may be empty
} moe__range;

// The i-th range (0, 1, ...) of a thread's work; 0 when there is none. All threads' ranges
// together cover every row of every entry once. With many tokens a row of down has the same
// thread in every entry, so that each may add to the residual directly; with one token it need
// not, see moe__schedule_info.owns_rows.
typedef int moe__schedule_fn(const moe__task *task, int thread, int n_threads, int32_t i,
                             moe__range *range);

MOE__INLINE int64_t moe__task_rows(const moe__task *task, int32_t entry) {
    const moe__ffn *ffn = task->entries[entry].ffn;
    return task->down ? ffn->down.n_out : ffn->gate.n_out;
}

// Rows of one entry for member `thread` of n: the same part of every entry.
MOE__INLINE int moe__task_stripe(const moe__task *task, int32_t entry, int thread, int n,
                                 moe__range *range) {
    range->entry = entry;
    moe__pool_range(moe__task_rows(task, entry), task->unit, thread, n, &range->begin, &range->end);
    return 1;
}

// All threads on one expert after another, each on its own rows. The rows of a thread are the
// same for every expert.
MOE__PRIVATE int moe__schedule_sequential(const moe__task *task, int thread, int n_threads,
                                          int32_t i, moe__range *range) {
    return i < task->n_entries && moe__task_stripe(task, i, thread, n_threads, range);
}
MOE__PRIVATE int moe__schedule_sequential_owns(const moe__task *task, int n_threads) {
    return (void)task, (void)n_threads, 1;
}

// How many experts are worked on at the same time: the greatest common divisor of active experts
// and threads. Then all groups have as many threads and do as many experts, and end together.
MOE__PRIVATE int moe__schedule_groups(const moe__task *task, int n_threads) {
    int a = task->one_token && task->n_routed ? task->n_routed : 1, b = n_threads;
    while (b) {
        const int rest = a % b;
        a = b, b = rest;
    }
    return a;
}

// Thread t belongs to group t % groups, which takes every groups-th routed expert and shares its
// rows; the entries that see all tokens are shared by all threads.
MOE__PRIVATE int moe__schedule_parallel(const moe__task *task, int thread, int n_threads, int32_t i,
                                        moe__range *range) {
    const int groups = moe__schedule_groups(task, n_threads);
    const int32_t rounds = task->n_routed / groups; // with one group: all of them
    if (groups == 1) return moe__schedule_sequential(task, thread, n_threads, i, range);
    if (i < rounds)
        return moe__task_stripe(task, i * groups + thread % groups, thread / groups,
                                n_threads / groups, range);
    i += task->n_routed - rounds;
    return i < task->n_entries && moe__task_stripe(task, i, thread, n_threads, range);
}
MOE__PRIVATE int moe__schedule_parallel_owns(const moe__task *task, int n_threads) {
    return moe__schedule_groups(task, n_threads) == 1;
}

// The first unit of an entry's rows that belongs to node k: the same part of every entry.
MOE__INLINE int64_t moe__schedule_node(const moe__task *task, int32_t entry, int32_t k) {
    const moe__nodes *nodes = task->nodes;
    const int64_t units = (moe__task_rows(task, entry) + task->unit - 1) / task->unit;
    return units * nodes->first[k] / nodes->first[nodes->n];
}

// One token: the rows of a node are shared by its n threads, each gets units / n of each entry,
// and the threads that get one of the remaining units are the next ones in turn. Example: 7 units
// on 4 threads leave 3 over. In the first entry threads 0, 1, 2 get one more, in the second 3, 0,
// 1, then 2, 3, 0 and 1, 2, 3: after four entries all have computed 7 units.
MOE__PRIVATE void moe__schedule_rotate(const moe__task *task, int thread, int32_t entry,
                                       moe__range *range) {
    const int32_t k = moe__nodes_of(task->nodes, thread);
    const int64_t n = task->nodes->first[k + 1] - task->nodes->first[k];
    const int64_t i = thread - task->nodes->first[k]; // which of them
    int64_t next = 0;                                  // in turn
    for (int32_t e = 0; e < entry; e++)
        next += (moe__schedule_node(task, e, k + 1) - moe__schedule_node(task, e, k)) % n;
    next %= n;
    const int64_t begin = moe__schedule_node(task, entry, k);
    const int64_t units = moe__schedule_node(task, entry, k + 1) - begin;
    const int64_t each = units / n, last = next + units % n;
    // threads next .. last - 1, modulo n, get one more: how many are before this one?
    const int64_t wrapped = moe__max(last - n, 0);
    int64_t before = moe__min(i, wrapped);
    if (i > next) before += moe__min(i, moe__min(last, n)) - next;
    const int more = i < wrapped || (i >= next && i < last);
    const int64_t rows = moe__task_rows(task, entry);
    range->entry = entry;
    range->begin = moe__min(rows, (begin + each * i + before) * task->unit);
    range->end = moe__min(rows, (begin + each * (i + 1) + before + more) * task->unit);
}

// Many tokens: the first block of rows of an entry whose middle lies in the work of `thread` or
// behind, when all work is laid out in one line and cut into equal parts.
MOE__PRIVATE int64_t moe__schedule_cut(const moe__task *task, int32_t entry, int thread,
                                       int n_threads) {
    const moe__entry *e = &task->entries[entry], *last = &task->entries[task->n_entries - 1];
    const int64_t total = last->cost_before + moe__entry_cost(last),
                  cost = moe__entry_block_cost(e);
    // the smallest j with (2 (cost_before + j cost) + cost) n_threads >= 2 total thread
    const int64_t need = 2 * total * thread - (2 * e->cost_before + cost) * n_threads;
    const int64_t step = 2 * cost * n_threads;
    return need <= 0 ? 0 : moe__min((need + step - 1) / step, moe__entry_blocks(e));
}

// Rotating down costs a barrier: not unless equal parts would leave over a 16th idle.
MOE__PRIVATE int moe__schedule_balanced_owns(const moe__task *task, int n_threads) {
    const int64_t rows = task->entries[0].ffn->down.n_out;
    const int64_t units = (rows + task->unit - 1) / task->unit;
    const int64_t most = (units + n_threads - 1) / n_threads;
    return !task->one_token || task->n_entries < 2 || 16 * units >= 15 * most * n_threads;
}

MOE__PRIVATE int moe__schedule_balanced(const moe__task *task, int thread, int n_threads, int32_t i,
                                        moe__range *range) {
    if (i >= task->n_entries) return 0;
    if (task->down && moe__schedule_balanced_owns(task, n_threads))
        return moe__task_stripe(task, i, thread, n_threads, range);
    if (task->one_token) {
        moe__schedule_rotate(task, thread, i, range);
        return 1;
    }
    const int64_t rows = moe__task_rows(task, i);
    const int64_t first = moe__schedule_cut(task, i, thread, n_threads);
    const int64_t next = moe__schedule_cut(task, i, thread + 1, n_threads);
    range->entry = i;
    range->begin = moe__min(first * MOE__TILE_ROWS, rows);
    range->end = moe__min(next * MOE__TILE_ROWS, rows);
    return 1;
}

// To add a schedule: its functions and a row here. owns_rows: whether, in down, no two threads
// ever get the same row, whatever the expert.
typedef struct moe__schedule_info {
    moe_schedule schedule;
    const char *name;
    moe__schedule_fn *range;
    int (*owns_rows)(const moe__task *task, int n_threads);
} moe__schedule_info;

static const moe__schedule_info moe__schedules[] = {
    {MOE_SCHEDULE_SEQUENTIAL, "sequential", moe__schedule_sequential,
     moe__schedule_sequential_owns},
    {MOE_SCHEDULE_PARALLEL, "parallel", moe__schedule_parallel, moe__schedule_parallel_owns},
    {MOE_SCHEDULE_BALANCED, "balanced", moe__schedule_balanced, moe__schedule_balanced_owns},
};

// NULL: this build has no such schedule.
MOE__PRIVATE const moe__schedule_info *moe__schedule_find(moe_schedule schedule) {
    if (schedule == MOE_SCHEDULE_DEFAULT)
        schedule = MOE__PARALLEL_EXPERTS   ? MOE_SCHEDULE_PARALLEL
                   : MOE__BALANCED_EXPERTS ? MOE_SCHEDULE_BALANCED
                                           : MOE_SCHEDULE_SEQUENTIAL;
    for (size_t i = 0; i < sizeof moe__schedules / sizeof moe__schedules[0]; i++)
        if (moe__schedules[i].schedule == schedule) return &moe__schedules[i];
    return NULL;
}

// ---- computing the ranges --------------------------------------------------------------------

// Rows of another matrix begin with a wait for memory, unless they were fetched before: 4 KiB,
// which is what dot kernels fetch ahead of themselves.
enum { MOE__FETCH = 4096 };
MOE__PRIVATE void moe__matrix_fetch(const moe__matrix *matrix, int32_t expert, int64_t begin,
                                    int64_t end) {
    if (begin >= end) return;
    const uint8_t *rows = moe__matrix_row(matrix, expert, begin);
    const size_t size = (size_t)(end - begin) * matrix->row_size;
    for (size_t i = 0; i < size && i < MOE__FETCH; i += 64) __builtin_prefetch(rows + i, 0, 3);
}
// The beginning of this thread's range i, if there is one.
MOE__PRIVATE void moe__range_fetch(const moe__schedule_info *schedule, const moe__task *task,
                                   int thread, int n_threads, int32_t i) {
    moe__range range;
    if (!schedule->range(task, thread, n_threads, i, &range)) return;
    const moe__entry *entry = &task->entries[range.entry];
    moe__matrix_fetch(task->down ? &entry->ffn->down : &entry->ffn->gate, entry->expert,
                      range.begin, range.end);
}

// Private to a thread, taken with the session's buffers (moe__work_layout_local) and freed with
// its pool.
typedef struct moe__scratch {
    void *pack;            // MOE__PACK_SIZE bytes
    float *gate, *up;      // n_batch * MOE__TILE_ROWS, at least the longest vector, floats each
    const void **x, **x_up; // n_batch pointers to activations each
} moe__scratch;

// hidden = silu(gate x) * up x (or the like) for some rows of one entry. in: [MOE__INPUTS]; the
// hidden vectors are the input of down. One token: two long runs through memory, rows of gate
// and then of up. Many: tile by tile (MOE__TILE_ROWS rows), gate and up in turns, so that what they
// make is combined while it is in the cache, and the tile that comes next is fetched meanwhile.
MOE__PRIVATE void moe__experts_gate_up(const moe__kernels *kernels, const moe__entry *entry,
                                       int64_t begin, int64_t end, const moe__acts *in,
                                       const moe__scratch *scratch) {
    const moe__matrix *gate = &entry->ffn->gate, *up = &entry->ffn->up;
    const moe__acts *hidden = &in[entry->ffn->down.input];
    moe__glu_fn *glu = entry->ffn->oai ? kernels->swiglu_oai : kernels->swiglu;
    const int32_t expert = entry->expert;
    const int64_t n = entry->n_tokens;
    if (begin >= end) return;
    moe__acts_gather(in, gate, entry->tokens, 0, n, scratch->x);
    moe__acts_gather(in, up, entry->tokens, 0, n, scratch->x_up);
    if (n == 1) {
        float *h = moe__acts_f32(hidden, entry->hidden_row) + begin;
        moe__matrix_fetch(up, expert, begin, end);
        moe__matmul(kernels, gate, expert, begin, end, scratch->x, 1, h, 0, NULL);
        moe__matmul(kernels, up, expert, begin, end, scratch->x_up, 1, scratch->up, 0, NULL);
        glu(h, scratch->up, end - begin, h);
        return;
    }
    for (int64_t row = begin; row < end; row += MOE__TILE_ROWS) {
        int64_t n_rows = moe__min(end - row, MOE__TILE_ROWS);
        moe__matmul_tile(kernels, gate, expert, row, n_rows, scratch->x, n, scratch->gate,
                         MOE__TILE_ROWS, scratch->pack, moe__next_tile(up, expert, row, end));
        moe__matmul_tile(kernels, up, expert, row, n_rows, scratch->x_up, n, scratch->up,
                         MOE__TILE_ROWS, scratch->pack,
                         moe__next_tile(gate, expert, row + n_rows, end));
        for (int64_t t = 0; t < n; t++)
            glu(scratch->gate + t * MOE__TILE_ROWS, scratch->up + t * MOE__TILE_ROWS, n_rows,
                moe__acts_f32(hidden, entry->hidden_row + t) + row);
    }
}

// out[row] = down hidden for some rows of one entry with one token: where several threads compute
// the same row for different experts. They are added up behind a barrier, in the entries' order.
MOE__PRIVATE void moe__experts_down_apart(const moe__kernels *kernels, const moe__entry *entry,
                                          int64_t begin, int64_t end, const moe__acts *in,
                                          float *out, const moe__scratch *scratch) {
    const moe__matrix *down = &entry->ffn->down;
    if (begin >= end) return;
    moe__acts_gather(in, down, NULL, entry->hidden_row, 1, scratch->x);
    moe__matmul(kernels, down, entry->expert, begin, end, scratch->x, 1, out + begin, 0,
                scratch->pack);
}

// sum[token] += weight * (down hidden) for some rows of one entry.
MOE__PRIVATE void moe__experts_down(const moe__kernels *kernels, const moe__entry *entry,
                                    int64_t begin, int64_t end, const moe__acts *in, float *sum,
                                    const moe__scratch *scratch) {
    const moe__matrix *down = &entry->ffn->down;
    moe__acts_gather(in, down, NULL, entry->hidden_row, entry->n_tokens, scratch->x);
    moe__matmul_add(kernels, down, entry->expert, begin, end, scratch->x, entry->n_tokens,
                    entry->tokens, entry->weights, sum, scratch->up, scratch->pack);
}

// ==============================================================================================
// >>text
//
// Text to tokens and back: byte-level BPE ("gpt2"), SPM ("llama"). What moe_vocab_tokenize does:
//
//     text        "hi <|im_end|> it's 42"
//     fragments   "hi " [<|im_end|>] " it's 42"     special tokens are found, longest first
//     words       "hi" " " | " it" "'s" " " "42"    rules of the pre-tokenizer on Unicode classes
//     symbols     a byte each, written as a printable character (GPT-2's names for bytes)
//     tokens      neighbours merge, lowest rank first, then leftmost
//
// With SPM a fragment is one word, with a blank in front and U+2581 for blanks; symbols are
// characters, and two merge if that makes a token, highest score first.
//
// Each step takes at most n log n in the length of the text; no input is quadratic. Vocabularies
// are hostile: sizes are checked, and hashes are keyed so that no file can choose collisions. A
// vocabulary copies what it needs, so that the GGUF may go, and never changes after opening, but
// for the working memory that one call leaves to the next.
// ==============================================================================================

// ---- GPT-2's names for bytes -----------------------------------------------------------------

// Printable Latin-1 stands for itself, the other 68 bytes in ascending order are U+0100 to
// U+0143. Writes the name in UTF-8, 1 or 2 bytes, and returns its size.
MOE__PRIVATE size_t moe__text_byte_name(unsigned char byte, char *out) {
    uint32_t code = byte;
    if (byte < 0x21) code = 0x100u + byte;
    else if (byte >= 0x7F && byte <= 0xA0) code = 0x121u + byte - 0x7F;
    else if (byte == 0xAD) code = 0x143;
    out[0] = (char)(code < 0x80 ? code : 0xC0 | code >> 6);
    if (code >= 0x80) out[1] = (char)(0x80 | (code & 0x3F));
    return code < 0x80 ? 1 : 2;
}

// The byte that a character names, or -1.
MOE__PRIVATE int moe__text_named_byte(uint32_t code) {
    if (code >= 0x100 && code <= 0x120) return (int)code - 0x100;
    if (code >= 0x121 && code <= 0x142) return (int)code - 0x121 + 0x7F;
    if (code == 0x143) return 0xAD;
    if (code < 0x21 || (code >= 0x7F && code <= 0xA0) || code == 0xAD || code > 0xFF) return -1;
    return (int)code;
}

// ---- classes of characters -------------------------------------------------------------------

// A character's classes are a set of bits: its general category (none: control, unassigned, ...)
// and the sets that pre-tokenizers name. A set with MOE__C_NOT holds the characters that have
// none of its bits.
enum {
    MOE__C_LU = 1 << 0, // \p{Lu} and so on
    MOE__C_LL = 1 << 1,
    MOE__C_LT = 1 << 2,
    MOE__C_LM = 1 << 3,
    MOE__C_LO = 1 << 4,
    MOE__C_L = 0x1F,
    MOE__C_M = 1 << 5,
    MOE__C_N = 1 << 6,
    MOE__C_P = 1 << 7,
    MOE__C_S = 1 << 8,
    MOE__C_WHITE = 1 << 9,    // White_Space, \s
    MOE__C_NEWLINE = 1 << 10, // [\r\n]
    MOE__C_BLANK = 1 << 11,   // U+0020
    MOE__C_SLASH = 1 << 12,   // [/]
    MOE__C_DIGIT = 1 << 13,   // [0-9]
    MOE__C_ALPHA = 1 << 14,   // [A-Za-z]
    MOE__C_MARK = 1 << 15,    // printable ASCII but letters, digits and the blank
    MOE__C_MATH = 1 << 16,    // [$+<=>^~|]
    MOE__C_HAN = 1 << 17,     // \p{Han}
    MOE__C_HEAD = 1 << 18,    // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] without Han
    MOE__C_TAIL = 1 << 19,    // [\p{Ll}\p{Lm}\p{Lo}\p{M}] without Han
    MOE__C_CJK = 1 << 20,     // deepseek-v3's ideographs and kana
    MOE__C_CASED = 1 << 21,   // deepseek-llm's letters: most of \p{Lu}\p{Ll}\p{Lt}
    MOE__C_STOP = 1 << 22,    // deepseek-llm's punctuation, ASCII letters included
    MOE__C_WIDE = 1 << 23,    // deepseek-llm's ideographs, Hangul, and most scripts of Asia
    MOE__C_ASIAN = 1 << 24,   // afmoe's scripts without blanks between words
    MOE__C_TURNS = 1 << 29,   // in the table: upper and lower case in turns, upper case first
    MOE__C_CUT = 1 << 30      // in a text: a word begins here
};
#define MOE__C_NOT 0x80000000u

MOE__INLINE int moe__text_in(uint32_t classes, uint32_t set) {
    return ((classes & set) != 0) != (set >> 31);
}

// Unicode 14.0.0, 2519 runs; printed by tests/unicode_tables.py.
enum { MOE__TEXT_RUNS = 2519 };
static const char *const moe__text_classes[] = {
    "y$,z'([`_`]yVZbZ|/[`Y`|5Y`Y`'(|#(YdYaGY`!cT`4Z`SGYUY{2`y.{9`y5yzf5zh5yxi/4h6/4.4/40514/40",
    "6/4/4i/4.5.4/404.4/5G.6J.:4.:4.:4zh5zj5.:4.404yzhy4/4/5.414yfy|6G|6zFcyFzaEy`A`Azdz|PiA`.",
    "4#A6Y.%a.Y0!.!/4z2!y0}8.506{j8.4`.4/5yy0yx9}i`yMyyk/4yj5zyk!~/#A_~vZ#b!yxOYMYNYNYMy#|I%JZ",
    "z&bZ`ZayQY![}HAyJ{OyV]HMzzIYGyM!`RBN`PHyVIaGzZ#GM|L|O#zxKyQGz#yV}IyOB`[A#Ma{JPAyOAOAQ#z[!",
    "|GO#Y!yK&{L`Ly$yN~KA{R!}OyyLOGzRGyMyJNZyVYAzIO!yH#H#{J!yG!G$J#MGyM#N#OGy#M%H!IN#yVHaXaGYM",
    "#O!L%H#{J!yG!H!H!H#M!Q%N#O$My!J!Gy!yVNIMYy%O!yI!I!{J!yG!H!K#MGyN!O!O#Gz$HN#yVY`y!GR!O!yH#",
    "H#{J!yG!H!K#MGyM#N#Oy!O%H!IN#yV`GXy%MG!L$I!J$H!G!H$H$I$yL%Q$O!P#G'Mz#zSya&QyH!I!{K!zJ#MGy",
    "M!O!Py!N!I#G#HN#yVy!YyS`GOYyH!I!{K!yJ!K#MGyM!O!Py!N'H!HN#yV!Hz!PyI!I!~KNGyM!O!PG`%IMySIN#",
    "{S`L!O!zL${L!yI!G#yG$M%R!M!yN'yV#NYy'yxLMHyM%`LAyNYyVZ~!H!G!K!{L!G!yJMHyOG#K!A!R#yV#J}#Gb",
    "z[`YbNe{T`M`M`M]NyH!}L%{NYNKyQ!}R!yaMe!a^cZ~!yxG{NGyV_LPJOGOHyMIPzGyRGMyVPa~/!l&l#yxrYAty",
    "x}K!J#yG!G!J#~K!J#}I!J#yG!G!J#zI!yzI!J#y|G#Oy[{T$zJyc'zx/#9#Yzx}H`YzK(|HZ$y}I[UyHy!zLPy${",
    "GOZy$zLNy'zG!I!Ny'yyJ}N[A[`GM#yV'yV'y^O!MyV'}KAyyKy!KN}JMG&y|Jy%}G!yR%yR%`$ZyV|L#Ky&yxH%|",
    "H'yW$}c{KQ#ZyyKyP!|Q#MyV'yV'yYA_#}Myy!QyxKzQyH$yVyYycyOybZ!O|LzMHyVyxHzNy#]}L{N$^yV$IyV|L",
    "FZyty!yx.#0yZy#OY{OJMLMHOG&yx5y{Cz4A}7~Ay{P{{jy6zzfy6y/9#3#y5y/y5y/9#3#y5!.!.!.!.y5y/z5#y",
    "5y;y5y;y5y;8!51:`4b6!51:b7#51!by52b#6!51:a!y,&{_)&({Z`zY`y_(z%SA#XbZAyVbZ!zA$}bz$}Oz$a.c.",
    "a40504`.b2e.`.`.`1`414J4a5/d.7c4`yyU.4Wa%yy~c]|dZ}~e|!yd{$yzXy}e{Vzx|czZ|Xyy`Z}`y]yz|`{]y",
    "{b]}aZyy~a#}a!z{byx3yx9.405k14.5.9B04zzf5eiO.4&]SZ~s!r&r#yzHy!AYz#M{Ky$yG!yG!yG!yG!yG!yG!",
    "yG!yG!}Nyx^A}Zay_}%|a!zxdy'}xc|#ye%([`AGSy]ay_`yURYEaUAGYa!zxH#NaBGYzxLYCG&yxG!zyJ!aVyc}H",
    "}ey'zJ}`!yV|eyT`zU}ayV~bzUyx|a{yz~Jy{cy{y{zGA{~yI$yz`y$~JFZ~zJA[zJyVH{#yxiGPYyPYA|iBNy|Jy",
    "VN_y#{dyCazf6y{gAy5i/4ygAaiGlrltlrlrlrlrlrlrlrlrlrlrprprlrlrlrlrlrlrlrorlr&lr!r!rlrlr{'Cl",
    "rGBryGMIMJM{KQcM$Xc'yyJ]y#NyyHzRy#ZyV'zRL[GYHMyV|JyNZ{KzMy&Y|K$PyxKzNzY!AyV%ZKMAyIyVK!~Kz",
    "Ny$IMyHN#yV#]zJALbGOyyHMGOHNKNGMG{'HAZyKQZGBNy%L#L#Ly$yG!yG!yxr`DytAa%y~5}KyNYN#yV'}z~~Ly",
    "'{K%yyG|x}y%yy|L#z{J~#y4y'8&GMyJ`zG!K!G!H!H!z{Lzdz%yy|IZzcy{J#yyLy!`}#yLczPy]'zP}^!zZ`Yb!",
    "Y`Z%K!{yI%[`_`]yVZbZ|/[`Y`|5Y`Y`yYyJAyxIB}G$L#L#L#I$y`!y`z!a#yL!|H!{G!H!zI#zH}%z~I&[%yxU$",
    "ybyzUzdTb!z`$`yx&yxbM{x%|K$yyGz$M|U%}HVy${HSyHS&~HQ&|L!Y}L%yHYW~'~1~7y}L#yV'}3%}9%~Jy#yyJ",
    "y&Yyp!zn!yl!m!yv!zt!yr!sy|!yxzKy${Jy%yH{'F!~F!yCy|$L#G!yxH!H$G#{K!YyT{KayS}Gy#yUyx'{G!H&W",
    "{JX$Y|H&Yy{%yzH%THzV#yxVGO!N&PJ!I!|K#O%MyUy!y[y!|KTY|KU}#yH`|JN%WyYy$yyL$yY{J#yT{G&yTzLy!",
    "]y'ySy~#y}Gyz!yy0z!yy6y!X}LPy#yV~~'}S!~L!NY#Hy}'|KyVGy#{JyQV^{%zLP]~#{IyS{#{Ky$OyyKzOyY%|",
    "XMHNGy$PyxIyQZ!]Mz!|Gy!yV'O}LzN!yV]GNGy#}KMZGy$OyxLzNJ]PYNyVGYG[!{Ty&zL!|GyR_My{&yG!G!J!z",
    "I!yJY'yxKyR&yV'P!yH#H#{J!yG!H!K!NGyM#N#O#G'M&KN#yM$Q{z!yyKzRJ^yVZ!YMI|'yxL{NHYGy#yV{~%yxK",
    "yM#yO{^JN}%yxLzQ[Gy&yV'zY{!yxGzMGY'yVyy'|I#zO%yX[`yG|z&yxHzOYzz%}/}5{Sy'yH#G#yH!H!{LR!N#P",
    "GMGN[y$yVy|%yH#~IyM#yMGYGM|$GyP~JyMGPyZMy#GyQyxJzP[G^z!y}G~y&yI!~GyN!yNG^y%|W$Z|L#{P!zNy}",
    "!yG!H!~HR$M!N!yMGMy#yV'L!H!}HQ!N!QGy!yVyxz%{GPZ|z$Gz${U|dz!Y{x~Jzz'z|U!^y&||Jyy~}#zzGZz!{",
    "|{Iy~}z&y~~G|yz{&y~{Ky!}G!yV%Zy~G!yV'|L#QYy%yxLyM^cDY`y%yV!yS!{I&{Gzzz%}m}s{W]zz&y}I%MGyz",
    "My!PzAy{%BYAMy&Nz#z~~xJy#|y{H~'yI|zz}!D!yA!B!~~Iyx$Iz&Jy#yzzLyx}~%z{K&zG$yIy!yJ#`NYzy~~'y",
    "xP#{Qy$z}ayz'}}ey%~b#yzeQbRy#yNayM|ePy{`{$y{eO`{|%{Ty'zxby$|S{y$|m|s|myr!zw|m|sl!m#l#m#o!",
    "ymu!r!yr!yv|m|sm!o#ym!yl!|sm!o!p!l$yl!|s|m|s|m|s|m|s|m|s|m|s|m|u#|l`|r`w|l`|r`w|l`|r`w|l`",
    "|r`w|l`|r`wlr#yyTy}yayzMcyyNyaMzaMa^z$Q!zO{}y'yuG{s}z$yM!zQ#yM!N!Q}x$yxI$yMyA#yV%G`yx|#|L",
    "Mz&yxHPyV&`|y|'yG!J!H!zI!||K#yUyM~&}1}7yMA%yV%Zz||&yzW`U`Vy}%yxU`zU||#J!|I!H!G#G!yJ!J!G!G",
    "'G%G!G!G!I!H!G#G!G!G!G!G!H!G#J!yG!J!J!G!yJ!zK&I!K!zKyy%a~z'yxa%zzcy'zb#zb!zb!~`y%zS{}dyz#",
    "|dz!yxa%yby!az#e{|%{zze&zc$z`$z}ay'zxdy!ye%`z$ye%yzay#yc'~cy#|e#ay}'yyxcy'za#d$d$y`y$|d$y",
    "d&ey%yc'yay#y`y${{b!yz`~!yV{{{%z~}zxL}#zxx~Gy!}yL#z}|yHz#{|z~Iy{{~!y}~H}x}'zz}|Gyxx}xx|&}",
    "|R",
};

// The sets that are no general category: set, first and last of each range, 0.
static const uint32_t moe__text_sets[] = {
    MOE__C_NEWLINE, 0x0A, 0x0A, 0x0D, 0x0D, 0, MOE__C_BLANK, 0x20, 0x20, 0,
    MOE__C_SLASH, 0x2F, 0x2F, 0, MOE__C_DIGIT, 0x30, 0x39, 0,
    MOE__C_ALPHA, 0x41, 0x5A, 0x61, 0x7A, 0,
    MOE__C_MARK, 0x21, 0x2F, 0x3A, 0x40, 0x5B, 0x60, 0x7B, 0x7E, 0,
    MOE__C_MATH, 0x24, 0x24, 0x2B, 0x2B, 0x3C, 0x3E, 0x5E, 0x5E, 0x7C, 0x7C, 0x7E, 0x7E, 0,
    MOE__C_STOP, 0x21, 0x2F, 0x3A, 0x7E, 0x2018, 0x201F, 0x3000, 0x3002, 0xFF01, 0xFF0F, 0xFF1A,
    0xFF5E, 0, MOE__C_WIDE, 0x0800, 0x9FA5, 0xAC00, 0xD7FF, 0,
    MOE__C_CJK, 0x3040, 0x30FF, 0x4E00, 0x9FA5, 0,
    MOE__C_ASIAN, 0x0E40, 0x0EFF, 0x1000, 0x109F, 0x1100, 0x11FF, 0x1780, 0x17FF, 0x2F00, 0x2FDF,
    0x3040, 0x30FF, 0x3400, 0x4DBF, 0x4E00, 0x9FFF, 0xA9E0, 0xA9FF, 0xAA60, 0xAA7F, 0xAC00, 0xD7AF,
    0xF900, 0xFAFF, 0xFF65, 0xFF9F, 0,
    MOE__C_HAN, 0x2E80, 0x2E99, 0x2E9B, 0x2EF3, 0x2F00, 0x2FD5, 0x3005, 0x3005, 0x3007, 0x3007,
    0x3021, 0x3029, 0x3038, 0x303B, 0x3400, 0x4DBF, 0x4E00, 0x9FFF, 0xF900, 0xFA6D, 0xFA70, 0xFAD9,
    0x16FE2, 0x16FE3, 0x16FF0, 0x16FF1, 0x20000, 0x2A6DF, 0x2A700, 0x2B738, 0x2B740, 0x2B81D,
    0x2B820, 0x2CEA1, 0x2CEB0, 0x2EBE0, 0x2F800, 0x2FA1D, 0x30000, 0x3134A, 0, 0};

// The first table, decoded: a run covers the characters from start to the next run's start.
typedef struct moe__text_run {
    uint32_t start, classes;
} moe__text_run;

// Decodes moe__text_classes into MOE__TEXT_RUNS + 1 runs.
MOE__PRIVATE void moe__text_unpack_classes(moe__text_run *runs) {
    static const uint32_t meaning[14] = {
        0, MOE__C_WHITE, MOE__C_LU | MOE__C_CASED, MOE__C_LL | MOE__C_CASED,
        MOE__C_LT | MOE__C_CASED, MOE__C_LM, MOE__C_LO, MOE__C_M, MOE__C_N, MOE__C_P, MOE__C_S,
        MOE__C_TURNS | MOE__C_CASED, MOE__C_LU, MOE__C_LL};
    uint32_t n = 0, code = 0, high = 0;
    for (size_t row = 0; row < sizeof moe__text_classes / sizeof moe__text_classes[0]; row++) {
        for (const char *p = moe__text_classes[row]; *p; p++) {
            // Place in the alphabet: printable ASCII without '"', '?' and '\'.
            uint32_t v = (uint32_t)(*p - '!') - (*p > '"') - (*p > '?') - (*p > '\\');
            if (v >= 84) { // a digit of the length
                high = high * 7 + v - 84;
                continue;
            }
            runs[n].start = code;
            runs[n].classes = meaning[v / 6];
            if (n < MOE__TEXT_RUNS) n++;
            code += 1 + v % 6 + 6 * high;
            high = 0;
        }
    }
    runs[n].start = code; // unassigned from here on
    runs[n].classes = 0;
}

MOE__PRIVATE uint32_t moe__text_classify(const moe__text_run *runs, uint32_t code) {
    size_t low = 0, high = MOE__TEXT_RUNS + 1; // runs[low].start <= code < runs[high].start
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (runs[middle].start <= code) low = middle;
        else high = middle;
    }
    uint32_t classes = runs[low].classes;
    if (classes & MOE__C_TURNS) {
        classes &= ~(uint32_t)MOE__C_TURNS;
        classes |= (code - runs[low].start) & 1 ? MOE__C_LL : MOE__C_LU;
    }
    for (const uint32_t *p = moe__text_sets; *p; p++)
        for (uint32_t set = *p++; *p; p += 2)
            if (code >= p[0] && code <= p[1]) classes |= set;
    if (classes & MOE__C_HAN) return classes;
    if (classes & (MOE__C_LM | MOE__C_LO | MOE__C_M)) return classes | MOE__C_HEAD | MOE__C_TAIL;
    if (classes & (MOE__C_LU | MOE__C_LT)) return classes | MOE__C_HEAD;
    return classes & MOE__C_LL ? classes | MOE__C_TAIL : classes;
}

// ---- pre-tokenizers: the tables --------------------------------------------------------------

// A pre-tokenizer cuts a fragment into words, each of which is merged for itself. It is a list of
// passes, a pass is a list of rules. A pass walks through each word of the pass before: at every
// place the first rule that matches makes a word; what no rule matches stays together as one. The
// rules are the alternatives of the regular expression in the models' tokenizer.json, $ and
// (?!...) look no further than the word.
enum {
    MOE__RULE_END,         // of the list
    MOE__RULE_RUN,         // prefix? head* body{min,max} tail{0,tail_max}
    MOE__RULE_PREFIXED,    // prefix  head* body{min,max} tail{0,tail_max}
    MOE__RULE_CASED,       // the same as RUN and an optional contraction in any case
    MOE__RULE_WORDS,       // prefix? \p{L}\p{M}*( ?\p{L}\p{M}*)*, prefix without letters
    MOE__RULE_CONTRACTION, // 's|'t|'re|'ve|'m|'ll|'d
    MOE__RULE_ANY_CASE,    // (?i:'s|'t|'re|'ve|'m|'ll|'d)
    MOE__RULE_TO_NEWLINE,  // \s*[\r\n]+ = \s*[\r\n]: up to the last newline among white space
    MOE__RULE_BUT_LAST,    // \s+(?!\S): white space but its last character before a word
    MOE__RULE_AT_END,      // \s+$
    MOE__RULE_THREES       // \p{N}{1,3} so that a multiple of three numbers follows; what lies
                           // between the last match and this one becomes part of the word
};

typedef struct moe__text_rule {
    uint8_t kind;
    uint8_t min, max, tail_max;         // max, tail_max: 0 = any number
    uint32_t prefix, head, body, tail; // sets; 0 is empty: never matched
} moe__text_rule;

#define MOE__RULE(kind)              {MOE__RULE_##kind, 0, 0, 0, 0, 0, 0, 0}
#define MOE__RUN(prefix, body, tail) {MOE__RULE_RUN, 1, 0, 0, prefix, 0, body, tail}
#define MOE__UPTO(max, body)         {MOE__RULE_RUN, 1, max, 0, 0, 0, body, 0}
#define MOE__PASS(name, ...) \
    static const moe__text_rule moe__text_##name[] = {__VA_ARGS__, MOE__RULE(END)}

#define MOE__LEAD (MOE__C_NOT | MOE__C_NEWLINE | MOE__C_L | MOE__C_N) // [^\r\n\p{L}\p{N}]
#define MOE__SIGN (MOE__C_NOT | MOE__C_WHITE | MOE__C_L | MOE__C_N)   // [^\s\p{L}\p{N}]
#define MOE__HEAD (MOE__C_LU | MOE__C_LT | MOE__C_LM | MOE__C_LO | MOE__C_M)
#define MOE__TAIL (MOE__C_LL | MOE__C_LM | MOE__C_LO | MOE__C_M)
//   \s*[\r\n]+|\s+(?!\S)|\s+
#define MOE__SPACES MOE__RULE(TO_NEWLINE), MOE__RULE(BUT_LAST), MOE__RUN(0, MOE__C_WHITE, 0)

// (?i:'s|...)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|spaces; then numbers
// one by one, with marks as parts of words, without newlines after signs.
#define MOE__WORDS(letters, max, signs, tail) \
    MOE__RULE(ANY_CASE), MOE__RUN(MOE__LEAD, letters, 0), MOE__UPTO(max, MOE__C_N), \
        MOE__RUN(MOE__C_BLANK, signs, tail), MOE__SPACES
MOE__PASS(llama3, MOE__WORDS(MOE__C_L, 3, MOE__SIGN, MOE__C_NEWLINE));
MOE__PASS(qwen2, MOE__WORDS(MOE__C_L, 1, MOE__SIGN, MOE__C_NEWLINE));
MOE__PASS(qwen35, MOE__WORDS(MOE__C_L | MOE__C_M, 1, MOE__SIGN | MOE__C_M, MOE__C_NEWLINE));
MOE__PASS(seed_coder, MOE__WORDS(MOE__C_L, 1, MOE__SIGN, 0));
MOE__PASS(exaone_moe, MOE__RULE(ANY_CASE), {MOE__RULE_WORDS, 0, 0, 0, MOE__LEAD, 0, 0, 0},
          MOE__UPTO(1, MOE__C_N),
          {MOE__RULE_RUN, 1, 0, 1, MOE__C_BLANK, 0, MOE__SIGN, MOE__C_NEWLINE}, MOE__SPACES);
// Words end where a capital letter follows a small one, and contractions belong to their word:
// lead?head*tail+(?i:'s|...)?|lead?head+tail*(?i:'s|...)?|\p{N}{1,3}| ?sign+[\r\n/]*|spaces
MOE__PASS(gpt4o, {MOE__RULE_CASED, 1, 0, 0, MOE__LEAD, MOE__HEAD, MOE__TAIL, 0},
          {MOE__RULE_CASED, 1, 0, 0, MOE__LEAD, 0, MOE__HEAD, MOE__TAIL}, MOE__UPTO(3, MOE__C_N),
          MOE__RUN(MOE__C_BLANK, MOE__SIGN, MOE__C_NEWLINE | MOE__C_SLASH), MOE__SPACES);
MOE__PASS(tekken, {MOE__RULE_RUN, 1, 0, 0, MOE__LEAD, MOE__HEAD, MOE__TAIL, 0},
          MOE__RUN(MOE__LEAD, MOE__HEAD, MOE__TAIL), MOE__UPTO(1, MOE__C_N),
          MOE__RUN(MOE__C_BLANK, MOE__SIGN, MOE__C_NEWLINE | MOE__C_SLASH), MOE__SPACES);
MOE__PASS(kimi_k2, MOE__RUN(0, MOE__C_HAN, 0),
          {MOE__RULE_CASED, 1, 0, 0, MOE__LEAD, MOE__C_HEAD, MOE__C_TAIL, 0},
          {MOE__RULE_CASED, 1, 0, 0, MOE__LEAD, 0, MOE__C_HEAD, MOE__C_TAIL},
          MOE__UPTO(3, MOE__C_N), MOE__RUN(MOE__C_BLANK, MOE__SIGN, MOE__C_NEWLINE), MOE__SPACES);
// 's|...| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)
MOE__PASS(gpt2, MOE__RULE(CONTRACTION), MOE__RUN(MOE__C_BLANK, MOE__C_L, 0),
          MOE__RUN(MOE__C_BLANK, MOE__C_N, 0), MOE__RUN(MOE__C_BLANK, MOE__SIGN, 0),
          MOE__RULE(BUT_LAST));
// [marks][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|spaces
MOE__PASS(deepseek_v3, {MOE__RULE_PREFIXED, 1, 0, 0, MOE__C_MARK, 0, MOE__C_ALPHA, 0},
          MOE__RUN(MOE__C_NOT | MOE__C_NEWLINE | MOE__C_L | MOE__C_P | MOE__C_S,
                   MOE__C_L | MOE__C_M, 0),
          MOE__RUN(MOE__C_BLANK, MOE__C_P | MOE__C_S, MOE__C_NEWLINE), MOE__SPACES);

MOE__PASS(newline, MOE__UPTO(1, MOE__C_NEWLINE));
MOE__PASS(number, MOE__UPTO(1, MOE__C_N));
MOE__PASS(numbers, MOE__RUN(0, MOE__C_N, 0));
MOE__PASS(3_numbers, MOE__UPTO(3, MOE__C_N));
MOE__PASS(3_digits, {MOE__RULE_RUN, 3, 3, 0, 0, 0, MOE__C_DIGIT, 0});
MOE__PASS(threes, MOE__RULE(THREES));
MOE__PASS(signs, MOE__RUN(0, MOE__C_P | MOE__C_MATH, 0));
MOE__PASS(cjk, MOE__RUN(0, MOE__C_CJK, 0));
MOE__PASS(wide, MOE__RUN(0, MOE__C_WIDE, 0));
MOE__PASS(asian, MOE__RUN(0, MOE__C_ASIAN, 0));
MOE__PASS(cased, MOE__RUN(MOE__C_WHITE, MOE__C_CASED, 0));
MOE__PASS(letters, MOE__RUN(MOE__C_WHITE, MOE__C_L, 0));
MOE__PASS(stops, MOE__RUN(MOE__C_WHITE, MOE__C_STOP, 0));
MOE__PASS(punctuation, MOE__RUN(MOE__C_WHITE, MOE__C_P, 0));
MOE__PASS(at_end, MOE__RULE(AT_END));

enum {
    MOE__PRE_IGNORE_MERGES = 1, // a word that is a token becomes that, whatever merging makes
    MOE__PRE_BOS = 2,    // tokenizer.ggml.add_bos_token is true unless the file says otherwise
    MOE__PRE_NO_BOS = 4, // there is no BOS unless the file names one
    MOE__PRE_SPM = 8,    // no pre-tokenizer: see moe__text_spm
    MOE__PRE_PASSES = 6
};

// A row per pattern; names as in tokenizer.ggml.pre, a blank between them.
typedef struct moe__text_pre {
    const char *names;
    unsigned flags;
    const moe__text_rule *passes[MOE__PRE_PASSES];
} moe__text_pre;

static const moe__text_pre moe__text_pres[] = {
    {"llama3 llama-v3 llama-bpe laguna falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     MOE__PRE_IGNORE_MERGES | MOE__PRE_BOS, {moe__text_llama3}},
    {"dbrx smaug-bpe", 0, {moe__text_llama3}},
    {"glm4 chatglm-bpe", MOE__PRE_NO_BOS, {moe__text_llama3}},
    {"qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open grok-2 kormo openpangu f2llmv2 "
     "bailingmoe bailingmoe2 llada-moe", 0, {moe__text_qwen2}},
    {"qwen35", 0, {moe__text_qwen35}},
    {"seed-coder", 0, {moe__text_seed_coder}},
    {"exaone-moe", 0, {moe__text_exaone_moe}},
    {"gpt-4o llama4 kanana2 minimax-m2", 0, {moe__text_gpt4o}},
    {"tekken", MOE__PRE_IGNORE_MERGES | MOE__PRE_BOS, {moe__text_tekken}},
    {"kimi-k2", 0, {moe__text_kimi_k2}},
    {"deepseek-v3 hunyuan-dense joyai-llm", 0,
     {moe__text_3_numbers, moe__text_cjk, moe__text_deepseek_v3}},
    {"deepseek-llm", 0, {moe__text_newline, moe__text_cased, moe__text_stops, moe__text_at_end,
                         moe__text_wide, moe__text_numbers}},
    {"deepseek-coder", 0, {moe__text_newline, moe__text_letters, moe__text_punctuation,
                           moe__text_wide, moe__text_number}},
    {"afmoe", 0, {moe__text_threes, moe__text_asian, moe__text_deepseek_v3}},
    {"gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code gigachat a.x-4.0 "
     "mellum modern-bert exaone4 mpt olmo jais trillion granite-docling", 0, {moe__text_gpt2}},
    {"starcoder refact command-r cohere2_moe smollm codeshell exaone minerva-7b mellum2", 0,
     {moe__text_number, moe__text_gpt2}},
    {"default", 0, {moe__text_signs, moe__text_gpt2, moe__text_numbers, moe__text_3_digits}}};

static const moe__text_pre moe__text_spm = {"", MOE__PRE_BOS | MOE__PRE_SPM, {NULL}};

MOE__PRIVATE const moe__text_pre *moe__text_find_pre(const char *name, size_t size) {
    for (size_t i = 0; i < sizeof moe__text_pres / sizeof moe__text_pres[0]; i++) {
        for (const char *p = moe__text_pres[i].names; *p;) {
            size_t length = strcspn(p, " ");
            if (length == size && memcmp(p, name, size) == 0) return &moe__text_pres[i];
            p += length + (p[length] == ' ');
        }
    }
    return NULL;
}

// ---- pre-tokenizers: matching ----------------------------------------------------------------

// The characters of a text and where a pass stands in it.
typedef struct moe__text_scan {
    const char *text;
    uint32_t *classes; // of character i
    uint32_t *at;      // its first byte in text; at[n] is the text's size
    size_t n;
    size_t end;        // of the word that the pass is in
    size_t run_end;    // of the run found last: spares rules that fail to look for it again
} moe__text_scan;

// Matchers take the character they start at and return the one behind the match, or the start.
MOE__PRIVATE size_t moe__text_run_of(const moe__text_scan *scan, size_t i, uint32_t set,
                                     size_t max) {
    size_t end = max && max < scan->end - i ? i + max : scan->end;
    while (i < end && moe__text_in(scan->classes[i], set)) i++;
    return i;
}

// A letter of a contraction, 0 if it is none; U+017F is an s to those who ignore case.
MOE__PRIVATE char moe__text_letter(const moe__text_scan *scan, size_t i, int any_case) {
    if (i >= scan->end) return 0;
    const char *p = scan->text + scan->at[i];
    size_t size = scan->at[i + 1] - scan->at[i];
    if (any_case && size == 2 && memcmp(p, "\xC5\xBF", 2) == 0) return 's';
    if (size != 1) return 0;
    return any_case && *p >= 'A' && *p <= 'Z' ? (char)(*p - 'A' + 'a') : *p;
}

MOE__PRIVATE size_t moe__text_contraction(const moe__text_scan *scan, size_t i, int any_case) {
    if (moe__text_letter(scan, i, 0) != '\'') return i;
    char a = moe__text_letter(scan, i + 1, any_case), b = moe__text_letter(scan, i + 2, any_case);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
    return (b == 'e' && (a == 'r' || a == 'v')) || (a == 'l' && b == 'l') ? i + 3 : i;
}

// MOE__RULE_RUN and its kin, as a backtracking matcher finds them: with the prefix if that leads
// to a match, and with the longest head* that leaves a body.
MOE__PRIVATE size_t moe__text_match_run(const moe__text_scan *scan, size_t i,
                                        const moe__text_rule *rule) {
    int prefix = moe__text_in(scan->classes[i], rule->prefix);
    for (; prefix >= (rule->kind == MOE__RULE_PREFIXED); prefix--) {
        size_t start = i + (size_t)prefix, body = start;
        if (rule->head) body = moe__text_run_of(scan, start, rule->head, 0);
        while (body > start &&
               (body == scan->end || !moe__text_in(scan->classes[body], rule->body)))
            body--;
        size_t end = moe__text_run_of(scan, body, rule->body, rule->max);
        if (end - body < rule->min) continue;
        if (rule->tail) end = moe__text_run_of(scan, end, rule->tail, rule->tail_max);
        return rule->kind == MOE__RULE_CASED ? moe__text_contraction(scan, end, 1) : end;
    }
    return i;
}

MOE__PRIVATE size_t moe__text_match_words(const moe__text_scan *scan, size_t i,
                                          const moe__text_rule *rule) {
    const uint32_t *classes = scan->classes;
    size_t p = i + (size_t)moe__text_in(classes[i], rule->prefix);
    if (p == scan->end || !(classes[p] & MOE__C_L)) return i;
    for (;; p++) { // over the blank between two words
        p = moe__text_run_of(scan, p, MOE__C_L | MOE__C_M, 0);
        if (p + 1 >= scan->end || !(classes[p] & MOE__C_BLANK) || !(classes[p + 1] & MOE__C_L))
            return p;
    }
}

MOE__PRIVATE size_t moe__text_match(moe__text_scan *scan, size_t i, const moe__text_rule *rule) {
    const uint32_t *classes = scan->classes;
    switch (rule->kind) {
    case MOE__RULE_RUN:
    case MOE__RULE_PREFIXED:
    case MOE__RULE_CASED: return moe__text_match_run(scan, i, rule);
    case MOE__RULE_WORDS: return moe__text_match_words(scan, i, rule);
    case MOE__RULE_CONTRACTION: return moe__text_contraction(scan, i, 0);
    case MOE__RULE_ANY_CASE: return moe__text_contraction(scan, i, 1);
    default: break;
    }
    uint32_t set = rule->kind == MOE__RULE_THREES ? MOE__C_N : MOE__C_WHITE;
    if (!(classes[i] & set)) return i;
    if (scan->run_end <= i) scan->run_end = moe__text_run_of(scan, i, set, 0);
    size_t end = scan->run_end;
    if (rule->kind == MOE__RULE_THREES) return i + (end - i - 1) % 3 + 1;
    if (rule->kind == MOE__RULE_AT_END) return end == scan->end ? end : i;
    if (rule->kind == MOE__RULE_BUT_LAST) return end == scan->end ? end : end - 1;
    while (end > i && !(classes[end - 1] & MOE__C_NEWLINE)) end--; // TO_NEWLINE
    return end;
}

// Cuts every word further. Linear: a rule that fails after looking at a long run is followed by
// one that takes the run, or remembers where it ends.
MOE__PRIVATE void moe__text_pass(moe__text_scan *scan, const moe__text_rule *rules) {
    uint32_t *classes = scan->classes;
    scan->end = 0;
    for (size_t i = 0, next; i < scan->n; i = next > i ? next : i + 1) {
        if (i == scan->end) {
            scan->end++;
            while (scan->end < scan->n && !(classes[scan->end] & MOE__C_CUT)) scan->end++;
            scan->run_end = 0;
        }
        const moe__text_rule *rule = rules;
        next = moe__text_match(scan, i, rule);
        while (next == i && (++rule)->kind != MOE__RULE_END) next = moe__text_match(scan, i, rule);
        if (next == i) continue;
        if (rule->kind != MOE__RULE_THREES) classes[i] |= MOE__C_CUT;
        if (next < scan->end) classes[next] |= MOE__C_CUT;
    }
}

// ---- hashing ---------------------------------------------------------------------------------

// Hashes are keyed with numbers that the author of a file cannot know, so that nobody can choose
// texts that collide and make lookups linear. All keys are odd.
enum {
    MOE__KEY_POINT = 0, // of polynomials modulo 2^31 - 1
    MOE__KEY_BLOCK = 1, // four for the words of a block
    MOE__KEY_FRONT = 5, // what lies in front of the last block
    MOE__KEY_PAIR = 6,  // two for pairs of numbers
    MOE__KEY_SPREAD = 8,
    MOE__KEYS = 9
};

MOE__INLINE uint64_t moe__text_mod(uint64_t x) { // up to 2^31 + 1 for x < 2^63
    x = (x & 0x7FFFFFFF) + (x >> 31);
    return (x & 0x7FFFFFFF) + (x >> 31);
}

// A text as a polynomial of its bytes; h: that of the text in front of it. That of any part of a
// text follows from those of its beginnings, for which special tokens take it.
MOE__PRIVATE uint64_t moe__text_polynomial(const uint64_t *keys, uint64_t h, const char *text,
                                           size_t size) {
    const uint64_t point = keys[MOE__KEY_POINT] & 0x7FFFFFFF;
    for (size_t i = 0; i < size; i++) h = moe__text_mod(h * point + (unsigned char)text[i]);
    return h % 0x7FFFFFFF;
}

// Up to 16 bytes as numbers, zeros behind them.
typedef struct moe__text_block {
    uint64_t low, high;
} moe__text_block;

MOE__PRIVATE moe__text_block moe__text_load_bytes(const char *text, size_t size) {
    moe__text_block block = {0, 0};
    memcpy(&block, text, size);
    return block;
}
// Bytes in front of `limit` may be read, also those behind the text.
MOE__INLINE moe__text_block moe__text_load(const char *text, size_t size, const char *limit) {
    static const uint8_t masks[32] = {255, 255, 255, 255, 255, 255, 255, 255,
                                      255, 255, 255, 255, 255, 255, 255, 255};
    if (limit - text < 16) return moe__text_load_bytes(text, size);
    moe__text_block block;
    block.low = moe__load_u64(text) & moe__load_u64(masks + 16 - size);
    block.high = moe__load_u64(text + 8) & moe__load_u64(masks + 24 - size);
    return block;
}

// A sum of key * word. Where two blocks differ in a word, by d = 2^t * odd, t < 32, the products
// of d with the 2^63 odd keys are 2^(63 - t) numbers that lie 2^(t + 1) apart, each as often. So
// the sums are equal for one key in 2^32, and their upper 31 bits for one in 2^30.
MOE__INLINE uint64_t moe__text_block_hash(const uint64_t *keys, moe__text_block block) {
    const uint64_t *key = keys + MOE__KEY_BLOCK;
    return key[0] * (uint32_t)block.low + key[1] * (block.low >> 32) +
           key[2] * (uint32_t)block.high + key[3] * (block.high >> 32);
}

// The hash of a sum. The same upper b bits of two that differ: for one key in 2^(b - 1). Sums of
// texts that are alike lie in rows, which would make clusters in a table: folded they do not.
MOE__INLINE uint32_t moe__text_spread(const uint64_t *keys, uint64_t sum) {
    return (uint32_t)((sum ^ sum >> 32) * keys[MOE__KEY_SPREAD] >> 32);
}

// Blocks of 16 bytes as coefficients of a polynomial modulo 2^31 - 1 behind the size of the
// text, `size` bytes in front of its last 1 to 16.
MOE__PRIVATE uint64_t moe__text_front(const uint64_t *keys, const char *text, size_t size,
                                      size_t front) {
    const uint64_t point = keys[MOE__KEY_POINT] & 0x7FFFFFFF;
    uint64_t h = size;
    for (const char *end = text + front; text < end; text += 16)
        h = moe__text_mod(h * point +
                          (moe__text_block_hash(keys, moe__text_load(text, 16, end)) >> 33));
    return h;
}

// A text to look for.
typedef struct moe__text_key {
    const char *text;
    size_t size;
    moe__text_block last; // its last 1 to 16 bytes, so that short texts are in here
    uint32_t hash;
} moe__text_key;

// What is in front of the last block, or the size alone, is one more word of that. The sums of
// two texts are equal for one key in 2^32, or size / 16 + 4 in 2^31 if they are longer than a
// block. Bytes in front of `limit` may be read.
MOE__INLINE void moe__text_set_key(moe__text_key *key, const uint64_t *keys, const char *text,
                                   size_t size, const char *limit) {
    uint64_t front = size;
    key->text = text;
    key->size = size;
    if (size > 16) {
        front = moe__text_front(keys, text, size, (size - 1) & ~(size_t)15);
        text += (size - 1) & ~(size_t)15;
        size = (size - 1) % 16 + 1;
    }
    key->last = moe__text_load(text, size, limit);
    key->hash = moe__text_spread(keys, moe__text_block_hash(keys, key->last) +
                                           keys[MOE__KEY_FRONT] * front);
}

// As good as that of a block.
MOE__INLINE uint32_t moe__text_pair_hash(const uint64_t *keys, uint32_t a, uint32_t b) {
    return moe__text_spread(keys, keys[MOE__KEY_PAIR] * a + keys[MOE__KEY_PAIR + 1] * b);
}

// A hash table of numbers from 1; what they stand for is looked up elsewhere. There are 2^bits
// slots, 0 = free. The upper bits of a hash say where the search for it begins, from where it
// goes up. A used slot has the other bits of its hash above the number, so that few searches
// look at what another number stands for.
typedef struct moe__text_table {
    uint32_t *slots;
    uint32_t mask; // 2^bits - 1
    int bits;
} moe__text_table;

// Room for n <= 2^30 numbers: a third of the slots stays free.
MOE__PRIVATE moe_status moe__text_table_init(moe__text_table *table,
                                             const moe_allocator *allocator, uint64_t n) {
    table->bits = 4;
    while ((uint64_t)2 << table->bits < 3 * n) table->bits++;
    table->mask = ((uint32_t)1 << table->bits) - 1;
    table->slots = (uint32_t *)moe__alloc_array(allocator, (uint64_t)table->mask + 1, 4);
    if (table->slots) memset(table->slots, 0, ((size_t)table->mask + 1) * 4);
    return table->slots ? MOE_OK : MOE_ERROR_MEMORY;
}

MOE__INLINE uint32_t *moe__text_home(const moe__text_table *table, uint32_t hash) {
    return &table->slots[hash >> (32 - table->bits)];
}
MOE__INLINE uint32_t *moe__text_after(const moe__text_table *table, const uint32_t *slot) {
    return &table->slots[(size_t)(slot + 1 - table->slots) & table->mask];
}
MOE__INLINE uint32_t moe__text_entry(const moe__text_table *table, uint32_t hash, uint32_t number) {
    return hash << table->bits | number;
}
// May the slot be of this hash?
MOE__INLINE int moe__text_fits(const moe__text_table *table, uint32_t slot, uint32_t hash) {
    return (slot ^ hash << table->bits) <= table->mask;
}

// Numbered texts and the way back. Text i lies at bytes[end[i]] .. bytes[end[i + 1] - 1].
typedef struct moe__text_map {
    const moe_allocator *allocator;
    const uint64_t *keys; // of hashes
    char *bytes;          // 16 more than max_bytes
    uint32_t *end;        // n + 1 entries, the first is 0
    uint32_t n, max_n, max_bytes;
    int twice;             // a text is there more than once
    moe__text_table table; // of 1 + number
} moe__text_map;

// At most so many texts and bytes: with them all sizes below fit 32 bits.
enum { MOE__TEXT_MAX = 1 << 29, MOE__TEXT_BATCH = 16 };

// How many of the next `left` are done together.
MOE__INLINE uint32_t moe__text_batch(uint32_t left) {
    return left < MOE__TEXT_BATCH ? left : (uint32_t)MOE__TEXT_BATCH;
}

MOE__INLINE moe_string moe__text_get(const moe__text_map *map, uint32_t i) {
    moe_string text;
    text.data = map->bytes + map->end[i];
    text.size = map->end[i + 1] - map->end[i];
    return text;
}

MOE__INLINE int moe__text_is(const moe__text_map *map, uint32_t i, const moe__text_key *key) {
    moe_string text = moe__text_get(map, i);
    if (text.size != key->size) return 0;
    if (text.size > 16) return memcmp(text.data, key->text, text.size) == 0;
    moe__text_block block = moe__text_load(text.data, text.size, text.data + 16);
    return ((block.low ^ key->last.low) | (block.high ^ key->last.high)) == 0;
}

// The slot that holds the text, or the free one where it belongs.
MOE__PRIVATE uint32_t *moe__text_slot(const moe__text_map *map, const moe__text_key *key) {
    const moe__text_table *table = &map->table;
    uint32_t *slot = moe__text_home(table, key->hash);
    for (; *slot; slot = moe__text_after(table, slot))
        if (moe__text_fits(table, *slot, key->hash) &&
            moe__text_is(map, (*slot & table->mask) - 1, key))
            break;
    return slot;
}

// Enters the texts from .. map->n - 1. Batches, so that their slots come from memory together.
MOE__PRIVATE void moe__text_enter(moe__text_map *map, uint32_t from) {
    const char *limit = map->bytes + map->max_bytes + 16;
    for (uint32_t n; from < map->n; from += n) {
        moe__text_key batch[MOE__TEXT_BATCH];
        n = moe__text_batch(map->n - from);
        for (uint32_t i = 0; i < n; i++) {
            moe_string text = moe__text_get(map, from + i);
            moe__text_set_key(&batch[i], map->keys, text.data, text.size, limit);
            __builtin_prefetch(moe__text_home(&map->table, batch[i].hash));
        }
        for (uint32_t i = 0; i < n; i++) {
            if (!batch[i].size) continue;
            uint32_t *slot = moe__text_slot(map, &batch[i]);
            map->twice |= *slot != 0;
            *slot = moe__text_entry(&map->table, batch[i].hash, from + i + 1); // the last counts
        }
    }
}

MOE__PRIVATE void moe__text_map_free(moe__text_map *map) {
    moe__free(map->allocator, map->bytes);
    moe__free(map->allocator, map->end);
    moe__free(map->allocator, map->table.slots);
}

MOE__PRIVATE moe_status moe__text_resize(moe__text_map *map, uint64_t n, uint64_t bytes) {
    if (n > MOE__TEXT_MAX || bytes > MOE__TEXT_MAX) return MOE_ERROR_FORMAT;
    moe__text_map old = *map;
    moe_status status = moe__text_table_init(&map->table, map->allocator, n + 2);
    map->max_n = map->table.mask / 3 * 2; // what the table has room for
    map->max_bytes = (uint32_t)(bytes + bytes / 2 + 64);
    map->bytes = (char *)moe__alloc_array(map->allocator, (uint64_t)map->max_bytes + 16, 1);
    map->end = (uint32_t *)moe__alloc_array(map->allocator, (uint64_t)map->max_n + 1, 4);
    if (!map->bytes || !map->end) status = MOE_ERROR_MEMORY;
    if (!status) map->end[0] = 0;
    if (!status && old.bytes) {
        memcpy(map->bytes, old.bytes, old.end[old.n]);
        memcpy(map->end, old.end, ((size_t)old.n + 1) * sizeof *map->end);
        moe__text_enter(map, 0);
    }
    moe__text_map_free(&old);
    return status;
}

// Makes room for n texts of so many bytes altogether. FORMAT: that is too much.
MOE__INLINE moe_status moe__text_reserve(moe__text_map *map, uint64_t n, uint64_t bytes) {
    return n <= map->max_n && bytes <= map->max_bytes ? MOE_OK : moe__text_resize(map, n, bytes);
}

// A heap with the smallest number on top.
#define MOE__TEXT_ABOVE(a, b) ((a) < (b))
MOE__HEAP(moe__text_heap, uint64_t, MOE__TEXT_ABOVE)

// ---- the vocabulary --------------------------------------------------------------------------

enum { // tokenizer.ggml.token_type
    MOE__TOKEN_NORMAL = 1,
    MOE__TOKEN_UNKNOWN = 2,
    MOE__TOKEN_CONTROL = 3,
    MOE__TOKEN_USER = 4,
    MOE__TOKEN_BYTE = 6,
    MOE__TOKEN_TYPE = 7, // mask
    MOE__TOKEN_END = 8,  // flag: ends generation
    MOE__TOKEN_STRIP = 16 // flag: takes the white space behind it
};

#define MOE__TEXT_NONE UINT32_MAX

typedef struct moe__text_merge {
    uint32_t left, right, result; // symbols
} moe__text_merge;

struct moe_vocab {
    moe_allocator allocator;
    struct moe__text_space *kept; // atomic; the memory of a call that is over, or NULL
    uint64_t keys[MOE__KEYS]; // of hashes
    const moe__text_pre *pre;
    moe__text_map symbols; // what merging works on: the tokens, then texts that are only merged
    uint32_t n_tokens, longest; // longest: bytes of a token
    uint8_t *types; // MOE__TOKEN_...
    int32_t bos, eos;
    int add_bos, add_eos, add_space; // add_space: a blank before raw text, SPM
    uint32_t *orders;        // SPM, else NULL: when a token is merged, least first, or NONE
    moe__text_merge *merges; // BPE; index = rank
    moe__text_table ranks;   // 1 + rank of (left, right)
    uint32_t byte_symbol[256]; // of the byte's name
    uint32_t raw_token[256]; // whose text is this byte itself, or NONE; SPM: for it, or unknown
    uint64_t *specials; // longest first, see moe__text_make_specials
    size_t n_specials;
    uint8_t starts[256]; // a special token begins with this byte
    moe__text_run runs[MOE__TEXT_RUNS + 1];
    uint32_t ascii[128]; // classes
};

// The slot of the merge (left, right), whose hash is given, or the free one where it belongs.
MOE__INLINE uint32_t *moe__text_rank_slot(const moe_vocab *vocab, uint32_t left, uint32_t right,
                                          uint32_t hash) {
    const moe__text_table *table = &vocab->ranks;
    uint32_t *slot = moe__text_home(table, hash);
    for (; *slot; slot = moe__text_after(table, slot)) {
        if (!moe__text_fits(table, *slot, hash)) continue;
        const moe__text_merge *merge = &vocab->merges[(*slot & table->mask) - 1];
        if (merge->left == left && merge->right == right) break;
    }
    return slot;
}

// The rank of the merge, or NONE.
MOE__PRIVATE uint32_t moe__text_rank(const moe_vocab *vocab, uint32_t left, uint32_t right) {
    uint32_t hash = moe__text_pair_hash(vocab->keys, left, right);
    return (*moe__text_rank_slot(vocab, left, right, hash) & vocab->ranks.mask) - 1;
}

// The token with this text, or NONE. Bytes in front of `limit` may be read.
MOE__PRIVATE uint32_t moe__text_find(const moe_vocab *vocab, const char *text, size_t size,
                                     const char *limit) {
    if (size == 0 || size > vocab->longest) return MOE__TEXT_NONE;
    moe__text_key key;
    moe__text_set_key(&key, vocab->keys, text, size, limit);
    uint32_t symbol = (*moe__text_slot(&vocab->symbols, &key) & vocab->symbols.table.mask) - 1;
    return symbol < vocab->n_tokens ? symbol : MOE__TEXT_NONE; // 0 - 1 = NONE
}

// Is the token looked for in texts? Without PARSE_SPECIAL only user-defined ones are.
MOE__INLINE int moe__text_is_special(const moe_vocab *vocab, uint32_t id, unsigned flags) {
    int type = vocab->types[id] & MOE__TOKEN_TYPE;
    return type == MOE__TOKEN_USER || (flags & MOE_TOKENIZE_PARSE_SPECIAL &&
                                       (type == MOE__TOKEN_UNKNOWN || type == MOE__TOKEN_CONTROL));
}

// ---- opening a vocabulary --------------------------------------------------------------------

// status: the first failure; nothing happens after it.
typedef struct moe__text_loader {
    moe_vocab *vocab;
    const moe_gguf *gguf;
    moe_error *error;
    moe_status status;
} moe__text_loader;

enum { MOE__TEXT_INTEGER, MOE__TEXT_STRING, MOE__TEXT_FLOAT };

// NULL if the file has no such value, or if it is not what is wanted, which is an error.
MOE__PRIVATE const moe_gguf_value *moe__text_value(moe__text_loader *loader, const char *key,
                                                   int is_array, int kind) {
    static const char *const one[] = {"an integer or a bool", "text", "a float32"};
    static const char *const many[] = {"integers or bools", "text", "float32"};
    static const int8_t kinds[] = {0, 0, 0, 0, 0, 0, 2, 0, 1, -1, 0, 0, -1}; // of moe_value_type
    const moe_gguf_value *value = loader->status ? NULL : moe_gguf_find_value(loader->gguf, key);
    if (!value) return NULL;
    const int fits = kinds[value->element_type] == kind, found = value->type == MOE_VALUE_ARRAY;
    if (fits && found == is_array) return value;
    moe__load_fail_at(loader, MOE_ERROR_FORMAT, value->offset, key,
                      "the value should be %s%s, and is %s%s", is_array ? "an array of " : "",
                      (is_array ? many : one)[kind], found ? "an array of type " : "of type ",
                      moe__gguf_value_names[value->element_type]);
    return NULL;
}

// Fails the load with what `status` means for the value of this key.
MOE__PRIVATE void moe__text_fail(moe__text_loader *loader, const char *key, moe_status status) {
    if (status)
        moe__load_fail(loader, status, key,
                       status == MOE_ERROR_MEMORY ? "out of memory for the vocabulary"
                                                  : "missing, empty or too large");
}

MOE__PRIVATE int moe__text_load_string(moe__text_loader *loader, const char *key,
                                       moe_string *out) {
    const void *cursor = NULL;
    return moe_gguf_value_string(moe__text_value(loader, key, 0, MOE__TEXT_STRING), &cursor, out);
}

// Memory for the vocabulary, not cleared; if there is none the load fails.
MOE__PRIVATE void *moe__text_load_array(moe__text_loader *loader, uint64_t count, size_t size) {
    void *memory = NULL;
    if (!loader->status) memory = moe__alloc_array(&loader->vocab->allocator, count, size);
    if (!memory) moe__text_fail(loader, "", MOE_ERROR_MEMORY);
    return memory;
}

// The tokenizer's name and its pre-tokenizer, "default" in files older than this key.
MOE__PRIVATE void moe__text_load_kind(moe__text_loader *loader) {
    moe_string name = {"", 0}, fallback = {"default", 7};
    const char *key = "tokenizer.ggml.model", *what = "tokenizer";
    const moe__text_pre **pre = &loader->vocab->pre;
    moe__text_load_string(loader, key, &name);
    if (name.size == 5 && memcmp(name.data, "llama", 5) == 0) *pre = &moe__text_spm;
    if (name.size == 4 && memcmp(name.data, "gpt2", 4) == 0) {
        key = "tokenizer.ggml.pre";
        what = "pre-tokenizer";
        if (!moe__text_load_string(loader, key, &name)) name = fallback;
        *pre = moe__text_find_pre(name.data, name.size);
    }
    if (loader->status || *pre) return;
    const moe_gguf_value *value = moe_gguf_find_value(loader->gguf, key);
    moe__load_fail_at(loader, MOE_ERROR_UNSUPPORTED, value ? value->offset : 0, key,
                      "%s \"%.*s\" is not supported", what,
                      (int)moe__utf8_limit(name.data, name.size, 64), name.data);
}

MOE__PRIVATE void moe__text_load_tokens(moe__text_loader *loader) {
    static const char key[] = "tokenizer.ggml.tokens";
    moe_vocab *vocab = loader->vocab;
    moe__text_map *map = &vocab->symbols;
    const moe_gguf_value *value = moe__text_value(loader, key, 1, MOE__TEXT_STRING);
    const void *cursor = NULL;
    moe_string text;
    uint64_t n = value ? value->count : 0;
    // each has 8 bytes of size in the file
    moe_status status = n ? moe__text_reserve(map, n, value->size - 8 * n) : MOE_ERROR_FORMAT;
    while (!status && map->n < n) {
        uint32_t at = map->end[map->n];
        if (!moe_gguf_value_string(value, &cursor, &text)) status = MOE_ERROR_FORMAT;
        else status = moe__text_reserve(map, n, (uint64_t)at + text.size);
        if (status) break;
        if (text.size) memcpy(map->bytes + at, text.data, text.size);
        if (text.size > vocab->longest) vocab->longest = (uint32_t)text.size;
        map->end[++map->n] = at + (uint32_t)text.size;
    }
    if (!status) moe__text_enter(map, 0);
    vocab->n_tokens = map->n;
    moe__text_fail(loader, key, status);
}

// An array with a value for each token, or NULL if the file has none.
MOE__PRIVATE const moe_gguf_value *moe__text_per_token(moe__text_loader *loader, const char *key,
                                                  int kind) {
    const moe_gguf_value *value = moe__text_value(loader, key, 1, kind);
    uint32_t n = loader->vocab->n_tokens;
    if (!value || value->count == n) return value;
    moe__load_fail_at(loader, MOE_ERROR_FORMAT, value->offset, key, "%llu values for %u tokens",
                      (unsigned long long)value->count, (unsigned)n);
    return NULL;
}

MOE__PRIVATE void moe__text_load_types(moe__text_loader *loader) {
    moe_vocab *vocab = loader->vocab;
    const moe_gguf_value *value =
        moe__text_per_token(loader, "tokenizer.ggml.token_type", MOE__TEXT_INTEGER);
    vocab->types = (uint8_t *)moe__text_load_array(loader, vocab->n_tokens, 1);
    for (uint32_t id = 0; vocab->types && id < vocab->n_tokens; id++) {
        int64_t type = MOE__TOKEN_NORMAL;
        if (value) moe_gguf_value_int(value, id, &type);
        vocab->types[id] = (uint8_t)(type >= 0 && type <= MOE__TOKEN_BYTE ? type : 0);
    }
}

// Makes a text that is not there the next symbol.
MOE__PRIVATE moe_status moe__text_add(moe_vocab *vocab, const moe__text_key *key, uint32_t *out) {
    moe__text_map *map = &vocab->symbols;
    uint32_t at = map->end[map->n];
    moe_status status = moe__text_reserve(map, (uint64_t)map->n + 1, (uint64_t)at + key->size);
    if (status) return status;
    if (key->text != map->bytes + at) memcpy(map->bytes + at, key->text, key->size);
    map->end[map->n + 1] = at + (uint32_t)key->size;
    *out = map->n++;
    *moe__text_slot(map, key) = moe__text_entry(&map->table, key->hash, map->n);
    return MOE_OK;
}

// The symbol of a text; a new one if there is none.
MOE__INLINE moe_status moe__text_intern(moe_vocab *vocab, const moe__text_key *key, uint32_t *out) {
    *out = (*moe__text_slot(&vocab->symbols, key) & vocab->symbols.table.mask) - 1;
    return *out == MOE__TEXT_NONE ? moe__text_add(vocab, key, out) : MOE_OK;
}

// A merge while it is read.
typedef struct moe__text_parts {
    moe__text_key left, right; // left.size 0: it has not two parts and is never found
    moe__text_key both;        // without its hash at first
    char joined[32];                 // the text of both, if that is not longer than a block
    uint32_t hash;                   // of the pair
} moe__text_parts;

// Takes "left right" apart. Bytes in front of `limit` may be read.
MOE__PRIVATE void moe__text_take_apart(const moe_vocab *vocab, moe_string text, const char *limit,
                                       moe__text_parts *out) {
    const char *a = text.data, *b;
    b = text.size > 2 ? (const char *)memchr(a + 1, ' ', text.size - 2) : NULL;
    out->left.size = 0;
    if (!b) return;
    size_t a_size = (size_t)(b++ - a), b_size = text.size - a_size - 1;
    moe__text_set_key(&out->left, vocab->keys, a, a_size, limit);
    moe__text_set_key(&out->right, vocab->keys, b, b_size, limit);
    __builtin_prefetch(moe__text_home(&vocab->symbols.table, out->left.hash));
    __builtin_prefetch(moe__text_home(&vocab->symbols.table, out->right.hash));
    out->both.size = a_size + b_size;
    if (out->both.size > 16) return;
    memcpy(out->joined, &out->left.last, 16); // zeros behind the text
    memcpy(out->joined + a_size, &out->right.last, 16);
    memcpy(&out->both.last, out->joined, 16);
}

// Joins long parts behind the texts of the map: they count when map->n does.
MOE__PRIVATE moe_status moe__text_join(moe_vocab *vocab, moe__text_parts *parts) {
    moe__text_map *map = &vocab->symbols;
    uint64_t at = map->end[map->n], end = at + parts->both.size;
    moe_status status = moe__text_reserve(map, (uint64_t)map->n + 1, end);
    if (status) return status;
    memcpy(map->bytes + at, parts->left.text, parts->left.size);
    memcpy(map->bytes + at + parts->left.size, parts->right.text, parts->right.size);
    moe__text_set_key(&parts->both, vocab->keys, map->bytes + at, parts->both.size,
                      map->bytes + end + 16);
    return MOE_OK;
}

// The symbol of both parts. Tokens are numbered as they were made by merges, so mostly it is
// that of the merge before (`guess`) or the next, which spares a search.
MOE__PRIVATE moe_status moe__text_intern_both(moe_vocab *vocab, moe__text_parts *parts,
                                              uint32_t guess, uint32_t *out) {
    const moe__text_map *map = &vocab->symbols;
    size_t size = parts->both.size;
    moe_status status = size > 16 ? moe__text_join(vocab, parts) : MOE_OK;
    for (uint32_t i = guess; size <= 16 && !map->twice && i < map->n && i - guess < 2; i++) {
        *out = i;
        if (moe__text_is(map, i, &parts->both)) return MOE_OK;
    }
    if (size <= 16)
        moe__text_set_key(&parts->both, vocab->keys, parts->joined, size, parts->joined + 16);
    return status ? status : moe__text_intern(vocab, &parts->both, out);
}

// Numbers the texts of a merge.
MOE__PRIVATE moe_status moe__text_name_parts(moe_vocab *vocab, moe__text_parts *parts,
                                             uint32_t guess, moe__text_merge *merge) {
    merge->left = merge->right = merge->result = MOE__TEXT_NONE;
    if (!parts->left.size) return MOE_OK;
    moe_status status = moe__text_intern(vocab, &parts->left, &merge->left);
    if (!status) status = moe__text_intern(vocab, &parts->right, &merge->right);
    if (!status) status = moe__text_intern_both(vocab, parts, guess, &merge->result);
    parts->hash = moe__text_pair_hash(vocab->keys, merge->left, merge->right);
    __builtin_prefetch(moe__text_home(&vocab->ranks, parts->hash));
    return status;
}

// Enters n <= MOE__TEXT_BATCH merges, the next ones of the file: each step for all of them, so
// that the memory of one is on its way while others are looked at.
MOE__PRIVATE moe_status moe__text_add_merges(moe_vocab *vocab, const moe_gguf_value *value,
                                             const void **cursor, uint32_t rank, uint32_t n) {
    const char *limit = (const char *)value->data + value->size;
    moe__text_parts batch[MOE__TEXT_BATCH];
    moe__text_merge *merges = vocab->merges + rank;
    uint32_t guess = rank ? merges[-1].result : 0;
    moe_status status = MOE_OK;
    moe_string text;
    for (uint32_t i = 0; i < n; i++) {
        if (!moe_gguf_value_string(value, cursor, &text)) return MOE_ERROR_FORMAT;
        moe__text_take_apart(vocab, text, limit, &batch[i]);
    }
    for (uint32_t i = 0; i < n && !status; guess = merges[i++].result)
        status = moe__text_name_parts(vocab, &batch[i], guess, &merges[i]);
    for (uint32_t i = 0; i < n && !status; i++) {
        if (!batch[i].left.size) continue;
        uint32_t *slot = moe__text_rank_slot(vocab, merges[i].left, merges[i].right,
                                             batch[i].hash);
        if (*slot == 0) // of equal ones the first
            *slot = moe__text_entry(&vocab->ranks, batch[i].hash, rank + i + 1);
    }
    return status;
}

MOE__PRIVATE void moe__text_load_merges(moe__text_loader *loader) {
    static const char key[] = "tokenizer.ggml.merges";
    moe_vocab *vocab = loader->vocab;
    const moe_gguf_value *value = moe__text_value(loader, key, 1, MOE__TEXT_STRING);
    if (loader->status) return;
    moe_status status = MOE_OK;
    for (int byte = 0; byte < 256 && !status; byte++) {
        char name[16] = {0}, raw[16] = {(char)byte};
        size_t size = moe__text_byte_name((unsigned char)byte, name);
        moe__text_key text;
        moe__text_set_key(&text, vocab->keys, name, size, name + 16);
        vocab->raw_token[byte] = moe__text_find(vocab, raw, 1, raw + 16);
        status = moe__text_intern(vocab, &text, &vocab->byte_symbol[byte]);
    }
    if (!value || value->count > MOE__TEXT_MAX) status = MOE_ERROR_FORMAT;
    if (!status) status = moe__text_table_init(&vocab->ranks, &vocab->allocator, value->count);
    if (!status)
        vocab->merges = (moe__text_merge *)moe__text_load_array(loader, value->count + 1,
                                                          sizeof *vocab->merges);
    const void *cursor = NULL;
    uint32_t count = !status && vocab->merges ? (uint32_t)value->count : 0, n;
    for (uint32_t rank = 0; !status && rank < count; rank += n) {
        n = moe__text_batch(count - rank);
        status = moe__text_add_merges(vocab, value, &cursor, rank, n);
    }
    moe__text_fail(loader, key, status);
}

// Reads a token id into *id, which stays as it is if the key is missing or names no token.
MOE__PRIVATE void moe__text_load_id(moe__text_loader *loader, const char *key, int32_t *id) {
    int64_t number;
    const moe_gguf_value *value = moe__text_value(loader, key, 0, MOE__TEXT_INTEGER);
    if (moe_gguf_value_int(value, 0, &number) && number >= 0 && number < loader->vocab->n_tokens)
        *id = (int32_t)number;
}

MOE__PRIVATE void moe__text_load_bool(moe__text_loader *loader, const char *key, int *out) {
    moe_gguf_value_bool(moe__text_value(loader, key, 0, MOE__TEXT_INTEGER), 0, out);
}

// Special tokens as size << 32 | polynomial << 1 | is user-defined, from large to small.
MOE__PRIVATE void moe__text_make_specials(moe__text_loader *loader) {
    moe_vocab *vocab = loader->vocab;
    size_t n = 0, max = 1;
    for (uint32_t id = 0; !loader->status && id < vocab->n_tokens; id++)
        max += (size_t)moe__text_is_special(vocab, id, MOE_TOKENIZE_PARSE_SPECIAL);
    uint64_t *specials = (uint64_t *)moe__text_load_array(loader, max, sizeof *specials);
    vocab->specials = specials;
    for (uint32_t id = 0; specials && id < vocab->n_tokens; id++) {
        moe_string text = moe__text_get(&vocab->symbols, id);
        if (!text.size || !moe__text_is_special(vocab, id, MOE_TOKENIZE_PARSE_SPECIAL) ||
            moe__text_find(vocab, text.data, text.size, text.data + text.size) != id)
            continue;
        vocab->starts[(unsigned char)text.data[0]] = 1;
        uint64_t sum = moe__text_polynomial(vocab->keys, 0, text.data, text.size);
        uint64_t user = (uint64_t)moe__text_is_special(vocab, id, 0);
        specials[n++] = (uint64_t)text.size << 32 | sum << 1 | user;
    }
    moe__text_heap_build(specials, n);
    moe__text_heap_sort(specials, n);
    vocab->n_specials = n;
}

// SPM: the orders of merging, from scores, and the tokens of bytes.
MOE__PRIVATE void moe__text_load_scores(moe__text_loader *loader) {
    moe_vocab *vocab = loader->vocab;
    const moe_gguf_value *value =
        moe__text_per_token(loader, "tokenizer.ggml.scores", MOE__TEXT_FLOAT);
    int32_t unknown = 0;
    moe__text_load_id(loader, "tokenizer.ggml.unknown_token_id", &unknown);
    moe__text_load_bool(loader, "tokenizer.ggml.add_space_prefix", &vocab->add_space);
    vocab->orders = (uint32_t *)moe__text_load_array(loader, vocab->n_tokens, 4);
    for (uint32_t id = 0; vocab->orders && id < vocab->n_tokens; id++) {
        int type = vocab->types[id] & MOE__TOKEN_TYPE;
        int word = type == MOE__TOKEN_NORMAL || type == MOE__TOKEN_USER; // may be spelled
        double score = 0;
        if (value) moe_gguf_value_float(value, id, &score);
        float f = score == score ? (float)score + 0.0f : -INFINITY; // no NaN, no -0
        uint32_t bits;
        memcpy(&bits, &f, 4);
        vocab->orders[id] = !word ? MOE__TEXT_NONE : bits >> 31 ? bits : bits ^ 0x7FFFFFFF;
    }
    for (int byte = 0; !loader->status && byte < 256; byte++) {
        static const char hex[] = "0123456789ABCDEF";
        char name[] = {'<', '0', 'x', hex[byte / 16], hex[byte % 16], '>'}, raw = (char)byte;
        uint32_t id = moe__text_find(vocab, name, 6, name + 6);
        if (id == MOE__TEXT_NONE) id = moe__text_find(vocab, &raw, 1, &raw + 1);
        vocab->raw_token[byte] = id == MOE__TEXT_NONE ? (uint32_t)unknown : id;
    }
}

// Texts that end generation wherever they are in a vocabulary.
static const char *const moe__text_ends[] = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    // what is between files and parts of a file where code is completed
    "<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<fim-repo>",
    "<|repo_name|>", "<REPO>", "<reponame>", "<|file_sep|>",
    "<\357\275\234end\342\226\201of\342\226\201sentence\357\275\234>"};

MOE__PRIVATE void moe__text_set_type(moe_vocab *vocab, const char *text, int type) {
    int32_t id = moe_vocab_find(vocab, text, strlen(text));
    if (id >= 0) vocab->types[id] = (uint8_t)type;
}

MOE__PRIVATE int moe__text_has_end(const moe_vocab *vocab, const char *text) {
    return moe_vocab_is_end(vocab, moe_vocab_find(vocab, text, strlen(text)));
}

MOE__PRIVATE void moe__text_correct_ends(moe_vocab *vocab) {
    static const char *const words[] = {"<|end|>", "<|channel|>", "<|message|>", "<|start|>",
                                        "<|constrain|>"};
    // The harmony format (gpt-oss): <|end|> ends one of several messages of a reply, and the
    // words of the format are output, so all of these are text.
    int call = moe__text_has_end(vocab, "<|call|>");
    if (moe__text_has_end(vocab, "<|end|>") &&
        ((call && moe__text_has_end(vocab, "<|return|>")) ||
         ((call || moe__text_has_end(vocab, "<|calls|>")) &&
          moe__text_has_end(vocab, "<|flush|>"))))
        for (int i = 0; i < 5; i++) moe__text_set_type(vocab, words[i], MOE__TOKEN_USER);
    int32_t id = moe_vocab_find(vocab, "</s>", 4);
    if (id >= 0 && moe__text_has_end(vocab, "<|tool_response>"))
        vocab->types[id] &= (uint8_t)~MOE__TOKEN_END;
}

MOE__PRIVATE void moe__text_load_ends(moe__text_loader *loader) {
    static const char *const keys[] = {
        "tokenizer.ggml.eos_token_id",     "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.eom_token_id",     "tokenizer.ggml.fim_pad_token_id",
        "tokenizer.ggml.fim_rep_token_id", "tokenizer.ggml.fim_sep_token_id"};
    moe_vocab *vocab = loader->vocab;
    if (loader->status) return;
    // Token 11 was the end of texts in the first vocabulary of this kind (Falcon's). Where it is
    // an ordinary word it must not end anything.
    vocab->eos = vocab->n_tokens > 11 && vocab->types[11] == MOE__TOKEN_CONTROL ? 11 : -1;
    vocab->bos = vocab->pre->flags & MOE__PRE_NO_BOS ? -1 : vocab->eos;
    vocab->add_bos = (vocab->pre->flags & MOE__PRE_BOS) != 0;
    if (vocab->pre->flags & MOE__PRE_SPM) {
        vocab->add_space = 1;
        vocab->bos = vocab->n_tokens > 1 ? 1 : -1;
        vocab->eos = vocab->n_tokens > 2 ? 2 : -1;
    }
    moe__text_load_id(loader, "tokenizer.ggml.bos_token_id", &vocab->bos);
    moe__text_load_bool(loader, "tokenizer.ggml.add_bos_token", &vocab->add_bos);
    moe__text_load_bool(loader, "tokenizer.ggml.add_eos_token", &vocab->add_eos);
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        int32_t id = i ? -1 : vocab->eos;
        moe__text_load_id(loader, keys[i], &id);
        if (i == 0) vocab->eos = id;
        if (id >= 0) vocab->types[id] |= MOE__TOKEN_END;
    }
    for (size_t i = 0; i < sizeof moe__text_ends / sizeof moe__text_ends[0]; i++)
        moe__text_set_type(vocab, moe__text_ends[i], MOE__TOKEN_CONTROL | MOE__TOKEN_END);
    moe__text_correct_ends(vocab);
}

// The special tokens of Phi-3 take the white space behind them, but for three; its files do not
// say so.
MOE__PRIVATE void moe__text_load_strip(moe__text_loader *loader) {
    const void *cursor = NULL;
    moe_string name = {"", 0};
    const moe_gguf_value *value = moe_gguf_find_value(loader->gguf, "general.name");
    if (value && value->type == MOE_VALUE_STRING) moe_gguf_value_string(value, &cursor, &name);
    char plain[128] = {0}; // lower case, without dashes
    for (size_t i = 0, n = 0; i < name.size && n < sizeof plain - 1; i++)
        if (name.data[i] != '-') plain[n++] = (char)(name.data[i] | 32);
    if (loader->status || !strstr(plain, "phi3")) return;
    moe_vocab *vocab = loader->vocab;
    const int32_t end = moe_vocab_find(vocab, "</s>", 4);
    for (uint32_t id = 0; id < vocab->n_tokens; id++)
        if (moe__text_is_special(vocab, id, MOE_TOKENIZE_PARSE_SPECIAL) || (int32_t)id == end)
            vocab->types[id] |= MOE__TOKEN_STRIP;
    for (int i = 0; i < 3; i++) {
        static const char *const keep[] = {"<s>", "<unk>", "<|endoftext|>"};
        const int32_t id = moe_vocab_find(vocab, keep[i], strlen(keep[i]));
        if (id >= 0) vocab->types[id] &= (uint8_t)~MOE__TOKEN_STRIP;
    }
}

// Hash keys from where memory lies and what time it is.
MOE__PRIVATE void moe__text_make_keys(moe_vocab *vocab) {
    double now = moe__seconds();
    uint64_t seed;
    memcpy(&seed, &now, sizeof seed);
    seed ^= (uint64_t)(uintptr_t)vocab << 16 ^ (uint64_t)(uintptr_t)&now;
    for (int i = 0; i < MOE__KEYS; i++) vocab->keys[i] = moe__splitmix64(&seed) | 1;
}

MOE_API moe_vocab *moe_vocab_open(const moe_gguf *gguf, moe_error *error) {
    moe__text_loader loader = {NULL, gguf, error, MOE_OK};
    if (!gguf) moe__fail(error, MOE_ERROR_ARGUMENT, "gguf", "gguf is NULL");
    else loader.vocab = (moe_vocab *)moe__alloc(&gguf->allocator, sizeof *loader.vocab);
    if (gguf && !loader.vocab) moe__text_fail(&loader, "", MOE_ERROR_MEMORY);
    if (!loader.vocab) return NULL;
    loader.vocab->allocator = gguf->allocator;
    loader.vocab->symbols.allocator = &loader.vocab->allocator;
    loader.vocab->symbols.keys = loader.vocab->keys;
    moe__text_make_keys(loader.vocab);
    moe__text_load_kind(&loader);
    moe__text_load_tokens(&loader);
    moe__text_load_types(&loader);
    moe__text_load_ends(&loader);
    if (!loader.status && loader.vocab->pre->flags & MOE__PRE_SPM) moe__text_load_scores(&loader);
    else moe__text_load_merges(&loader);
    if (!loader.status) moe__text_load_strip(&loader);
    moe__text_unpack_classes(loader.vocab->runs);
    for (uint32_t code = 0; code < 128; code++)
        loader.vocab->ascii[code] = moe__text_classify(loader.vocab->runs, code);
    moe__text_make_specials(&loader);
    if (!loader.status) return loader.vocab;
    moe_vocab_close(loader.vocab);
    return NULL;
}

// What moe_vocab_tokenize works in. Nothing in it is cleared, all is written before it is read.
typedef struct moe__text_space {
    size_t max_size, max_owner, max_spelled; // bytes of a text, bytes of a word's spelling
    uint32_t *at;    // max_size + 1, then max_size of classes
    uint32_t *owner; // max_owner
    uint64_t *heap;  // 2 max_spelled, then what moe__text_spell puts there
} moe__text_space;

// Larger ones are freed after the call.
enum { MOE__TEXT_KEPT = 16 << 20, MOE__TEXT_WORD_BYTES = 16 + 12 + 1 /* per max_spelled */ };

MOE__PRIVATE void moe__text_space_free(const moe_allocator *allocator, moe__text_space *space) {
    if (!space) return;
    moe__free(allocator, space->at);
    moe__free(allocator, space->owner);
    moe__free(allocator, space->heap);
    moe__free(allocator, space);
}

MOE_API void moe_vocab_close(moe_vocab *vocab) {
    if (!vocab) return;
    moe_allocator allocator = vocab->allocator;
    moe__text_space_free(&allocator, vocab->kept);
    moe__text_map_free(&vocab->symbols);
    moe__free(&allocator, vocab->types);
    moe__free(&allocator, vocab->orders);
    moe__free(&allocator, vocab->merges);
    moe__free(&allocator, vocab->ranks.slots);
    moe__free(&allocator, vocab->specials);
    moe__free(&allocator, vocab);
}

// ---- what is in a vocabulary -----------------------------------------------------------------

MOE__INLINE int moe__text_is_token(const moe_vocab *vocab, int32_t token) {
    return vocab && token >= 0 && (uint32_t)token < vocab->n_tokens;
}

MOE_API int32_t moe_vocab_size(const moe_vocab *vocab) {
    return vocab ? (int32_t)vocab->n_tokens : 0;
}
MOE_API int32_t moe_vocab_bos(const moe_vocab *vocab) { return vocab ? vocab->bos : -1; }
MOE_API int32_t moe_vocab_eos(const moe_vocab *vocab) { return vocab ? vocab->eos : -1; }

MOE_API int32_t moe_vocab_find(const moe_vocab *vocab, const char *text, size_t text_size) {
    return vocab && text ? (int32_t)moe__text_find(vocab, text, text_size, text + text_size)
                         : -1; // NONE is -1
}

MOE_API moe_string moe_vocab_token(const moe_vocab *vocab, int32_t token) {
    moe_string none = {NULL, 0};
    if (!moe__text_is_token(vocab, token)) return none;
    return moe__text_get(&vocab->symbols, (uint32_t)token);
}

MOE_API int moe_vocab_is_end(const moe_vocab *vocab, int32_t token) {
    return moe__text_is_token(vocab, token) && (vocab->types[token] & MOE__TOKEN_END);
}

MOE_API int moe_vocab_is_control(const moe_vocab *vocab, int32_t token) {
    return moe__text_is_token(vocab, token) &&
           (vocab->types[token] & MOE__TOKEN_TYPE) == MOE__TOKEN_CONTROL;
}

// The byte of "<0xE2>", or -1.
MOE__PRIVATE int moe__text_hex_byte(moe_string text) {
    char hex[3] = {0};
    if (text.size != 6 || memcmp(text.data, "<0x", 3) != 0 || text.data[5] != '>') return -1;
    memcpy(hex, text.data + 3, 2);
    return strspn(hex, "0123456789ABCDEFabcdef") == 2 ? (int)strtol(hex, NULL, 16) : -1;
}

MOE_API size_t moe_vocab_text(const moe_vocab *vocab, int32_t token, char *buffer,
                              size_t capacity) {
    if (!moe__text_is_token(vocab, token) || (capacity && !buffer)) return 0;
    moe_string text = moe__text_get(&vocab->symbols, (uint32_t)token);
    int type = vocab->types[token] & MOE__TOKEN_TYPE;
    if (type != MOE__TOKEN_NORMAL && type != MOE__TOKEN_USER && type != MOE__TOKEN_BYTE) return 0;
    size_t n = 0;
    for (size_t i = 0, size; i < text.size; i += size) {
        int byte = -1;
        uint32_t code;
        size = moe__utf8_next(text.data + i, text.size - i, &code);
        if (type == MOE__TOKEN_NORMAL && vocab->orders) byte = code == 0x2581 ? ' ' : -1;
        else if (type == MOE__TOKEN_NORMAL) byte = moe__text_named_byte(code);
        else if (type == MOE__TOKEN_BYTE && (byte = moe__text_hex_byte(text)) >= 0) size = 6;
        for (size_t k = 0; k < (byte < 0 ? size : 1); k++, n++) // names no byte: is itself
            if (n < capacity) buffer[n] = byte < 0 ? text.data[i + k] : (char)byte;
    }
    return n;
}

// ---- text to tokens: merging -----------------------------------------------------------------

// The rule of byte-pair encoding: of all neighbours that may merge, those of the lowest rank do,
// of equals the leftmost, until none may. Looking through the word each time would be quadratic.
// Instead, a heap has the key (rank, position) of every two neighbours that may merge. A merge
// changes only the pairs on both sides of the symbol that it makes, and both get keys. Keys of
// pairs that are gone stay, and show it when they come out: what is at their position has another
// key. There are n - 1 pairs of n symbols at first, and each of n - 1 merges takes a key and adds
// two: the heap holds 2 n at most, and merging takes n log n.
//
// A symbol is named after its first byte. A merge leaves the left one, with the new symbol; the
// right one falls out of the chain next / prev, whose ends are n and UINT32_MAX.

// One call of moe_vocab_tokenize. Indices fit 32 bits: texts are below 2 GiB.
typedef struct moe__text_work {
    const moe_vocab *vocab;
    int32_t *tokens;
    size_t capacity;
    uint64_t count; // of tokens so far, also beyond capacity
    moe__text_scan scan;
    // The word being merged: n bytes, spelled as in the vocabulary. Keys are order << 32 | left;
    // order: the rank, or from the score.
    uint64_t *heap;
    uint32_t *symbol, *next, *prev;
    char *spelled;
    const char *limit; // behind the memory of spelled
    size_t n_heap;
    uint32_t n;
    moe__text_space *space;
} moe__text_work;

// The memory that another call left, or new one.
MOE__PRIVATE moe__text_space *moe__text_space_take(const moe_vocab *vocab) {
    moe__text_space **kept = (moe__text_space **)&vocab->kept;
    moe__text_space *space = __atomic_exchange_n(kept, (moe__text_space *)NULL, __ATOMIC_ACQUIRE);
    return space ? space : (moe__text_space *)moe__alloc(&vocab->allocator, sizeof *space);
}

// Leaves it for the next call, if it is not too large, and frees what lies in its place.
MOE__PRIVATE void moe__text_space_leave(const moe_vocab *vocab, moe__text_space *space) {
    moe__text_space **kept = (moe__text_space **)&vocab->kept;
    uint64_t bytes = (uint64_t)space->max_size * 8 + (uint64_t)space->max_owner * 4 +
                     (uint64_t)space->max_spelled * MOE__TEXT_WORD_BYTES;
    if (bytes < MOE__TEXT_KEPT) space = __atomic_exchange_n(kept, space, __ATOMIC_ACQ_REL);
    moe__text_space_free(&vocab->allocator, space);
}

// Memory for `count` elements and one more, which is `memory` if that has room for them (*max).
// A quarter more, for the next text. What was in it is lost. NULL: there is none, *max is 0.
MOE__PRIVATE void *moe__text_grow(const moe_vocab *vocab, void *memory, size_t *max, size_t count,
                                  size_t size) {
    if (count <= *max) return memory;
    moe__free(&vocab->allocator, memory);
    *max = count + count / 4 + 256;
    memory = moe__alloc_array(&vocab->allocator, (uint64_t)*max + 1, size);
    if (!memory) *max = 0;
    return memory;
}

MOE__INLINE void moe__text_emit(moe__text_work *work, uint32_t id) {
    if (work->count < work->capacity) work->tokens[work->count] = (int32_t)id;
    work->count++;
}

// SPM: the token that is spelled so, or NONE.
MOE__PRIVATE uint32_t moe__text_spm_token(const moe__text_work *work, uint32_t i, uint32_t end) {
    const moe_vocab *vocab = work->vocab;
    uint32_t id = moe__text_find(vocab, work->spelled + i, end - i, work->limit);
    return id != MOE__TEXT_NONE && vocab->orders[id] != MOE__TEXT_NONE ? id : MOE__TEXT_NONE;
}

// What the symbol at left makes with the next one, or NONE, and the key of that in the heap.
MOE__PRIVATE uint32_t moe__text_joined(const moe__text_work *work, uint32_t left, uint64_t *key) {
    const moe_vocab *vocab = work->vocab;
    uint32_t right = left < work->n ? work->next[left] : work->n, order, result;
    if (right >= work->n) return MOE__TEXT_NONE;
    if (vocab->orders) {
        result = moe__text_spm_token(work, left, work->next[right]);
        order = result == MOE__TEXT_NONE ? result : vocab->orders[result];
    } else {
        order = moe__text_rank(vocab, work->symbol[left], work->symbol[right]);
        result = order == MOE__TEXT_NONE ? order : vocab->merges[order].result;
    }
    *key = (uint64_t)order << 32 | left;
    return result;
}

MOE__PRIVATE void moe__text_consider(moe__text_work *work, uint32_t left) {
    uint64_t key;
    if (moe__text_joined(work, left, &key) != MOE__TEXT_NONE)
        moe__text_heap_push(work->heap, &work->n_heap, key);
}

// Merges until no pair makes anything.
MOE__PRIVATE void moe__text_merge_word(moe__text_work *work) {
    for (uint32_t i = 0; i < work->n; i = work->next[i]) moe__text_consider(work, i);
    while (work->n_heap) {
        uint64_t key = moe__text_heap_pop(work->heap, &work->n_heap), now;
        uint32_t left = (uint32_t)key, result = moe__text_joined(work, left, &now);
        if (result == MOE__TEXT_NONE || now != key) continue; // the pair is gone
        uint32_t right = work->next[left], after = work->next[right];
        work->symbol[left] = result;
        work->next[right] = work->n; // merges with nothing any more
        work->next[left] = after;
        if (after < work->n) work->prev[after] = left;
        moe__text_consider(work, work->prev[left]);
        moe__text_consider(work, left);
    }
}

// Spells a word: bytes by their names, or (SPM) a blank in front and U+2581 for blanks.
MOE__PRIVATE moe_status moe__text_spell(moe__text_work *work, const char *text, size_t size) {
    const moe_vocab *vocab = work->vocab;
    size_t n = size + 3;
    for (size_t i = 0; i < size; i++) n += vocab->orders ? 2 * (text[i] == ' ') : 1;
    if (n > INT32_MAX) return MOE_ERROR_ARGUMENT;
    moe__text_space *space = work->space;
    space->heap = (uint64_t *)moe__text_grow(vocab, space->heap, &space->max_spelled, n,
                                             MOE__TEXT_WORD_BYTES);
    if (!space->heap) return MOE_ERROR_MEMORY;
    work->heap = space->heap;
    work->symbol = (uint32_t *)(work->heap + 2 * space->max_spelled);
    work->next = work->symbol + space->max_spelled;
    work->prev = work->next + space->max_spelled;
    work->spelled = (char *)(work->prev + space->max_spelled);
    work->limit = work->spelled + space->max_spelled;
    char *to = work->spelled;
    for (size_t i = vocab->orders && vocab->add_space ? 0 : 1; i <= size; i++) {
        char byte = i ? text[i - 1] : ' ';
        if (vocab->orders && byte == ' ') memcpy(to, "\342\226\201", 3);
        else if (vocab->orders) *to = byte;
        to += !vocab->orders ? moe__text_byte_name((unsigned char)byte, to) : byte == ' ' ? 3u : 1u;
    }
    work->n = (uint32_t)(to - work->spelled);
    return MOE_OK;
}

// A word to tokens. SPM hashes the text of pairs: slow only where very many beginnings of a long
// token are tokens.
MOE__PRIVATE moe_status moe__text_word(moe__text_work *work, const char *text, size_t size) {
    const moe_vocab *vocab = work->vocab;
    moe_status status = moe__text_spell(work, text, size);
    if (status) return status;
    uint32_t whole = MOE__TEXT_NONE;
    if (vocab->pre->flags & MOE__PRE_IGNORE_MERGES)
        whole = moe__text_find(vocab, work->spelled, work->n, work->limit);
    if (whole != MOE__TEXT_NONE && !moe_vocab_is_control(vocab, (int32_t)whole)) {
        moe__text_emit(work, whole); // control tokens are not spelled
        return MOE_OK;
    }
    for (uint32_t i = 0, before = UINT32_MAX, end; i < work->n; before = i, i = end) {
        unsigned char byte = (unsigned char)work->spelled[i];
        end = i + (byte >= 0xF0 ? 4u : byte >= 0xE0 ? 3u : byte >= 0xC0 ? 2u : 1u);
        if (end > work->n) end = work->n;
        work->symbol[i] = vocab->orders ? moe__text_spm_token(work, i, end)
                                        : vocab->byte_symbol[(unsigned char)*text++];
        work->next[i] = end;
        work->prev[i] = before;
    }
    moe__text_merge_word(work);
    for (uint32_t i = 0; i < work->n; i = work->next[i]) {
        if (work->symbol[i] < vocab->n_tokens) {
            moe__text_emit(work, work->symbol[i]);
            continue;
        }
        // No token: the bytes of its spelling one by one, those of them that are tokens.
        for (uint32_t k = i; k < work->next[i]; k++) {
            uint32_t id = vocab->raw_token[(unsigned char)work->spelled[k]];
            if (id != MOE__TEXT_NONE) moe__text_emit(work, id);
        }
    }
    return MOE_OK;
}

// A fragment without special tokens: pre-tokenizer, then merging.
MOE__PRIVATE moe_status moe__text_fragment(moe__text_work *work, const char *text, size_t size) {
    const moe_vocab *vocab = work->vocab;
    moe__text_scan *scan = &work->scan;
    moe_status status = MOE_OK;
    if (vocab->orders) return moe__text_word(work, text, size);
    scan->text = text;
    scan->n = 0;
    for (size_t i = 0; i < size; scan->n++) {
        uint32_t code;
        scan->at[scan->n] = (uint32_t)i;
        i += moe__utf8_next(text + i, size - i, &code);
        scan->classes[scan->n] =
            code < 128 ? vocab->ascii[code] : moe__text_classify(vocab->runs, code);
    }
    scan->at[scan->n] = (uint32_t)size;
    for (int pass = 0; pass < MOE__PRE_PASSES && vocab->pre->passes[pass]; pass++)
        moe__text_pass(scan, vocab->pre->passes[pass]);
    for (size_t i = 0, end; i < scan->n && !status; i = end) {
        for (end = i + 1; end < scan->n && !(scan->classes[end] & MOE__C_CUT);) end++;
        status = moe__text_word(work, text + scan->at[i], scan->at[end] - scan->at[i]);
    }
    return status;
}

// ---- text to tokens: special tokens ----------------------------------------------------------

// Special tokens take their bytes longest first, of one size from left to right, and none takes
// bytes of another. So the text is gone through once per size. To compare byte by byte would be
// quadratic where long tokens nearly match everywhere ("aaa...b" in "aaaa..."); with sums[i], the
// polynomial of the text's first i bytes, the hash of any part takes O(1).

// Those of one size, specials[from] to specials[to - 1]. owner[i] becomes 1 + the token that
// byte i is in. Tokens found before are no shorter, so they overlap a place only if they own its
// first or last byte.
MOE__PRIVATE void moe__text_find_specials_of(const moe_vocab *vocab, const char *text, size_t size,
                                  unsigned flags, size_t from, size_t to, const uint32_t *sums,
                                  uint32_t *owner) {
    const uint64_t prime = 0x7FFFFFFF, point = vocab->keys[MOE__KEY_POINT] & prime;
    size_t length = (size_t)(vocab->specials[from] >> 32);
    uint64_t power = 1;
    for (size_t k = 0; k < length; k++) power = moe__text_mod(power * point);
    power %= prime;
    for (size_t i = 0; i + length <= size; i++) {
        if (!vocab->starts[(unsigned char)text[i]] || owner[i] || owner[i + length - 1]) continue;
        uint64_t sum = (sums[i + length] + (prime - sums[i]) * power) % prime;
        uint64_t wanted = (uint64_t)length << 32 | sum << 1 | 1;
        size_t low = from, high = to; // the first that is no greater is in low .. high
        while (low < high) {
            size_t middle = (low + high) / 2;
            if (vocab->specials[middle] > wanted) low = middle + 1;
            else high = middle;
        }
        if (low == to || vocab->specials[low] >> 1 != wanted >> 1) continue;
        if (!(vocab->specials[low] & 1) && !(flags & MOE_TOKENIZE_PARSE_SPECIAL)) continue;
        uint32_t id = moe__text_find(vocab, text + i, length, text + size);
        if (id == MOE__TEXT_NONE || !moe__text_is_special(vocab, id, flags)) continue;
        for (size_t k = 0; k < length; k++) owner[i + k] = id + 1;
        i += length - 1;
    }
}

// All of them: n D log n for D different sizes of special tokens, about 20 in real vocabularies,
// at most sqrt(2 * bytes of all of them).
MOE__PRIVATE void moe__text_find_specials(const moe_vocab *vocab, const char *text, size_t size,
                                   unsigned flags, uint32_t *sums, uint32_t *owner) {
    memset(owner, 0, size * sizeof *owner);
    sums[0] = 0;
    for (size_t i = 0; i < size; i++)
        sums[i + 1] = (uint32_t)moe__text_polynomial(vocab->keys, sums[i], text + i, 1);
    for (size_t from = 0, to; from < vocab->n_specials; from = to) {
        uint64_t length = vocab->specials[from] >> 32;
        for (to = from + 1; to < vocab->n_specials && vocab->specials[to] >> 32 == length;) to++;
        if (length <= size)
            moe__text_find_specials_of(vocab, text, size, flags, from, to, sums, owner);
    }
}

// Memory for a text: the scan's, and `owner` only where a special token may begin. The scan's
// serves the search for special tokens first.
MOE__PRIVATE moe_status moe__text_prepare(moe__text_work *work, const char *text, size_t size,
                                          unsigned flags, uint32_t **owner) {
    const moe_vocab *vocab = work->vocab;
    moe__text_space *space = work->space;
    space->at = (uint32_t *)moe__text_grow(vocab, space->at, &space->max_size, size, 8);
    if (!space->at) return MOE_ERROR_MEMORY;
    work->scan.at = space->at;
    work->scan.classes = space->at + space->max_size + 1;
    for (size_t i = 0; i < size; i++) {
        if (!vocab->starts[(unsigned char)text[i]]) continue;
        space->owner = (uint32_t *)moe__text_grow(vocab, space->owner, &space->max_owner, size, 4);
        *owner = space->owner;
        if (!*owner) return MOE_ERROR_MEMORY;
        moe__text_find_specials(vocab, text, size, flags, work->scan.at, *owner);
        break;
    }
    return MOE_OK;
}

// Special tokens, then what is between them, from left to right.
MOE__PRIVATE moe_status moe__text_split(moe__text_work *work, const char *text, size_t size,
                                        unsigned flags) {
    const moe_vocab *vocab = work->vocab;
    uint32_t *owner = NULL;
    moe_status status = moe__text_prepare(work, text, size, flags, &owner);
    if (!status && !owner) return moe__text_fragment(work, text, size);
    for (size_t i = 0, end; i < size && !status; i = end) {
        if (owner[i]) {
            moe__text_emit(work, owner[i] - 1);
            end = i + moe__text_get(&vocab->symbols, owner[i] - 1).size;
            const int strips = vocab->types[owner[i] - 1] & MOE__TOKEN_STRIP;
            while (strips && end < size && !owner[end] &&
                   (text[end] == ' ' || (text[end] >= '\t' && text[end] <= '\r')))
                end++;
        } else {
            for (end = i; end < size && !owner[end];) end++;
            status = moe__text_fragment(work, text + i, end - i);
        }
    }
    return status;
}

// Memory for a call, and the call. Memory of one that failed is not kept: it may be needed.
MOE__PRIVATE moe_status moe__text_run_call(moe__text_work *work, const char *text, size_t size,
                                           unsigned flags) {
    work->space = moe__text_space_take(work->vocab);
    if (!work->space) return MOE_ERROR_MEMORY;
    moe_status status = moe__text_split(work, text, size, flags);
    if (status) moe__text_space_free(&work->vocab->allocator, work->space);
    else moe__text_space_leave(work->vocab, work->space);
    return status;
}

MOE_API int64_t moe_vocab_tokenize(const moe_vocab *vocab, const char *text, size_t text_size,
                                   unsigned flags, int32_t *tokens, size_t capacity) {
    const unsigned known = MOE_TOKENIZE_ADD_SPECIAL | MOE_TOKENIZE_PARSE_SPECIAL;
    if (!vocab || (!text && text_size) || (!tokens && capacity) || (flags & ~known) ||
        text_size > INT32_MAX)
        return -(int64_t)MOE_ERROR_ARGUMENT;
    moe__text_work work;
    memset(&work, 0, sizeof work);
    work.vocab = vocab;
    work.tokens = tokens;
    work.capacity = capacity;
    if (flags & MOE_TOKENIZE_ADD_SPECIAL && vocab->add_bos && vocab->bos >= 0)
        moe__text_emit(&work, (uint32_t)vocab->bos);
    moe_status status = text_size ? moe__text_run_call(&work, text, text_size, flags) : MOE_OK;
    if (flags & MOE_TOKENIZE_ADD_SPECIAL && vocab->add_eos && vocab->eos >= 0)
        moe__text_emit(&work, (uint32_t)vocab->eos);
    return status ? -(int64_t)status : (int64_t)work.count;
}

// ==============================================================================================
// >>model
//
// From a GGUF file to a model that can be run: hyper-parameters, the table of families, and the
// binding of tensors with a check of every shape. Optional parts (biases, norms of queries and
// keys, shared experts, fused matrices) are decided by the presence of their tensors; a key
// counts only where the family defines it. A tensor that nobody binds is an error, unless it is
// in moe__spares. A model never changes after it was opened.
//
// A file says what kind of model it holds (general.architecture, the family), how large
// (FAMILY.KEY) and gives its weights names. Three sources of truth that may contradict each other,
// written by somebody unknown: each number is bounded when it is read, each tensor's shape is what
// the numbers say, and both together say how much memory is taken. Where llama.cpp would read a
// file differently, it is refused with the reason: a model that runs wrong looks like a bad one.
//
// The tensors of a layer, "blk.N." before and ".weight" behind each name, with their dimensions
// {n_in, n_out} (vectors {n}); d = n_embd, H = n_head, K = n_head_kv, k and v = the widths of a
// head's key and value, E = n_expert, f = n_ff_exp, s = the width of the shared expert:
//
//   attn_norm, ffn_norm             {d}            before the mixer, before the experts
//   post_attention_norm, post_ffw_norm {d}         behind them (MOE__POST_NORMS)
//   attn_q, attn_k, attn_v          {d, H k} {d, K k} {d, K v}; or attn_qkv {d, H k + K k + K v}
//   attn_q_norm, attn_k_norm        {k}, {k}       or of all heads together: {H k}, {K k}
//   attn_gate, attn_sinks           {d, H v}, {H}
//   attn_output                     {H v, d}
//   of latent attention, r = n_rot, c = kv_lora, q = q_lora:
//   attn_kv_a_mqa, attn_kv_a_norm   {d, c + r}, {c}
//   attn_q, or attn_q_a, _norm, _b  {d, H k}, or {d, q}, {q}, {q, H k}
//   attn_k_b, attn_v_b              {k - r, c, H}, {c, v, H}; or attn_kv_b {c, H (k - r + v)}
//   of experts; the matrix of a dense layer has no _exps and one matrix:
//   ffn_gate_inp, exp_probs_b.bias  {d, E}, {E}
//   ffn_gate_exps, ffn_up_exps      {d, f, E}      or ffn_gate_up_exps {d, 2 f, E}, gate first;
//   ffn_down_exps                   {f, d, E}      or ffn_gate.0 ... ffn_down.E-1, one by one
//   ffn_gate_shexp, _up_, _down_    {d, s} {d, s} {s, d}; ffn_gate_inp_shexp {d}
//
// Beside them: token_embd {d, n_vocab}, output (or token_embd again) {d, n_vocab}, output_norm {d}.
// NAME.bias is added to a product, NAME.scale multiplies it.
// ==============================================================================================

enum { MOE__MAX_LAYERS = 512, MOE__MAX_HEADS = 4096, MOE__MAX_HEAD = 4096 };

// What families differ in, beyond what tensors and keys say by being there. A feature is named
// after what it does and not after a family: any family may have it, and it is read in one place.
enum {
    MOE__ROUTER_KEYS = 1,   // gating function, groups, normalization and scale come from keys
    MOE__NORMALIZE = 2,     // without router keys: weights of the chosen experts sum to 1
    MOE__QK_NORM = 4,       // norms of queries and keys, by head: their tensors must be there
    MOE__QK_NORM_WIDE = 8,  // the same over all heads together
    MOE__CLAMP_KQV = 16,    // attention.clamp_kqv bounds queries, keys and values
    MOE__SINKS = 32,        // attn_sinks: per head a score whose exponential joins the sum
    MOE__BIASES = 64,       // every matrix of a layer has a bias, which must be there
    MOE__OAI = 128,         // activation moe__kernels.swiglu_oai
    MOE__SHARED_COUNT = 256, // shared experts, as wide as expert_shared_count routed ones
    MOE__SHARED_GATED = 512, // one of its own width, times the sigmoid of its gate
    MOE__SHARED_WIDTH = 1 << 10, // one of its own width, if there is a key for that
    MOE__WIDTH_FFN = 1 << 11, // experts are as wide as feed_forward_length says
    MOE__FFN_SCALE = 1 << 12, // NAME.scale of feed-forward matrices counts for all types
    MOE__ALL_KEYS = 1 << 13,  // without attention.sliding_window every layer sees all keys
    MOE__PLAIN_SLIDING = 1 << 14, // layers with a window have rope without scaling
    MOE__NOPE_FULL = 1 << 15,     // layers without a window have no rope,
    MOE__NOPE_FOURTH = 1 << 16,   // nor has every fourth layer
    MOE__SCALES = 1 << 17,    // keys embedding_scale, residual_scale, attention.scale and
                              // logit_scale, by which logits are divided
    MOE__EMBD_ROOT = 1 << 18, // embeddings are multiplied by the root of their length
    MOE__POST_NORMS = 1 << 19, // post_attention_norm and post_ffw_norm: what a part of a layer
                               // adds to the residual is normed
    MOE__GATE = 1 << 20,      // attn_gate: results of heads times the sigmoid of (it x)
    MOE__BASE_SLIDING = 1 << 21 // layers with a window have the rope base rope.freq_base_swa
};

// How a layer mixes tokens: rows of moe__mixers (>>mixers)
typedef enum moe__mixer_id { MOE__GQA, MOE__MLA, MOE__N_MIXERS } moe__mixer_id;

typedef struct moe__family {
    const char *name; // general.architecture
    moe__mixer_id mixer;
    moe__rope_kind rope;
    int gating;        // moe__gating, if there is no key for it; 0: the key must be there
    int window_period; // of so many layers all but the last see a sliding window, unless
                       // attention.sliding_window_pattern says otherwise; 0: none does
    const char *ffn_norm; // name of the norm before the feed-forward part
    unsigned features;
} moe__family;

// In alphabetical order. Which tensors and keys a family has is what llama.cpp's loader reads for
// it; where its graph does what no feature says, the feature comes first.
static const moe__family moe__families[] = {
    {"afmoe", MOE__GQA, MOE__ROPE_NEOX, MOE__GATING_SIGMOID, 4, "ffn_norm",
     MOE__ROUTER_KEYS | MOE__QK_NORM | MOE__SHARED_COUNT | MOE__NOPE_FOURTH | MOE__EMBD_ROOT |
         MOE__POST_NORMS | MOE__GATE | MOE__BASE_SLIDING},
    {"deepseek2", MOE__MLA, MOE__ROPE_NORM, MOE__GATING_SOFTMAX, 0, "ffn_norm",
     MOE__ROUTER_KEYS | MOE__SHARED_COUNT},
    {"dots1", MOE__GQA, MOE__ROPE_NEOX, 0, 0, "ffn_norm",
     MOE__ROUTER_KEYS | MOE__QK_NORM | MOE__SHARED_COUNT},
    {"exaone-moe", MOE__GQA, MOE__ROPE_NEOX, 0, 4, "ffn_norm",
     MOE__ROUTER_KEYS | MOE__QK_NORM | MOE__SHARED_WIDTH | MOE__NOPE_FULL},
    {"gpt-oss", MOE__GQA, MOE__ROPE_NEOX, MOE__GATING_CHOSEN, 2, "post_attention_norm",
     MOE__SINKS | MOE__BIASES | MOE__OAI | MOE__BASE_SLIDING},
    {"granitemoe", MOE__GQA, MOE__ROPE_NORM, MOE__GATING_SOFTMAX, 0, "ffn_norm",
     MOE__NORMALIZE | MOE__WIDTH_FFN | MOE__SHARED_WIDTH | MOE__SCALES},
    {"llama", MOE__GQA, MOE__ROPE_NORM, MOE__GATING_SOFTMAX, 0, "ffn_norm",
     MOE__NORMALIZE | MOE__WIDTH_FFN | MOE__FFN_SCALE},
    {"mellum", MOE__GQA, MOE__ROPE_NEOX, MOE__GATING_SOFTMAX, 4, "ffn_norm",
     MOE__NORMALIZE | MOE__QK_NORM | MOE__ALL_KEYS | MOE__PLAIN_SLIDING | MOE__FFN_SCALE},
    {"olmoe", MOE__GQA, MOE__ROPE_NEOX, MOE__GATING_SOFTMAX, 0, "ffn_norm",
     MOE__QK_NORM_WIDE | MOE__CLAMP_KQV | MOE__WIDTH_FFN},
    {"qwen2moe", MOE__GQA, MOE__ROPE_NEOX, MOE__GATING_SOFTMAX, 0, "ffn_norm",
     MOE__SHARED_GATED},
    {"qwen3moe", MOE__GQA, MOE__ROPE_NEOX, MOE__GATING_SOFTMAX, 0, "ffn_norm",
     MOE__NORMALIZE | MOE__QK_NORM | MOE__FFN_SCALE},
};

// What may differ from layer to layer: nothing of it is read from the model as a whole.
typedef struct moe__layer {
    const float *attn_norm, *ffn_norm;             // n_embd
    const float *attn_post_norm, *ffn_post_norm;   // of what is added; NULL: none
    moe__mixer_id mixer;
    int32_t n_head, n_head_kv;
    int32_t head_k, head_v;      // values of a head's query and key, and of its value
    const moe__rope *rope;       // NULL: positions turn nothing
    int32_t window;              // keys seen by a query; 0: all
    float kq_scale;              // factor of query . key,
    double temperature;          // times 1 + temperature ln(1 + floor(position / length));
    int32_t temperature_length;  // by latent attention only
    float clamp_kqv;             // bound of queries, keys and values; 0: none
    moe__matrix q, k, v;                           // grouped-query attention
    const float *q_norm, *k_norm;                  // before rope; NULL: none
    int norm_wide;                                 // over all heads together
    const float *sinks;                            // per head; NULL: none
    moe__matrix gate;                              // of the results of heads
    int32_t q_lora, kv_lora;     // MLA ranks; q_lora 0: plain q
    int32_t n_rot;               // values of a key that all heads share, the last; turned
    moe__matrix q_a, q_b, kv_a, kv_b, k_b, v_b;    // MLA; kv_b, k_b, v_b: one per head
    const float *q_a_norm, *kv_a_norm;
    moe__matrix o;
    const moe__matrix *prefetch; // the one that the mixer reads first
    int is_moe;
    moe__matrix router;                            // ffn_gate_inp
    const float *probs_bias;                      // exp_probs_b: for choosing only
    moe__ffn experts, shared, dense;               // shared.gate.data NULL: none
    const float *shared_gate;                      // n_embd; NULL: weight 1
} moe__layer;

enum { MOE__ROPE_FULL, MOE__ROPE_SLIDING, MOE__N_ROPES };

struct moe_model {
    moe_allocator allocator;
    const moe_gguf *gguf;
    moe_gguf *own_gguf; // NULL if the caller's
    moe_vocab *vocab;
    moe_model_info info;
    const moe__family *family;
    int32_t n_blocks;            // layers of the file, those that are not run included
    int32_t n_ff_shared;
    int32_t n_dense;             // leading layers without experts
    float eps;
    float embd_scale, residual_scale, logit_scale; // factors of what they are named after
    moe__rope ropes[MOE__N_ROPES]; // of layers without and with a window; n_rot 0: no such one
    int32_t n_rope;              // floats of a row's tables of all of them
    moe__router router;
    moe__matrix token_embd, output;
    const float *output_norm;
    moe__layer *layers;
    unsigned kinds[MOE__INPUTS]; // forms in which the matrices want their inputs, and the
    int64_t widest[MOE__INPUTS]; // most values of each: found out where matrices are bound
    void *owned;                 // list of allocations, each begins with a pointer to the next
    moe_model_memory memory;     // as it was when the model had been opened
    moe_model_memory later;      // and when paging was done,
    int is_later;                // atomic: if that came later
    moe__paging paging;          // of the gguf's pages, if this model looks after them
};

// State while loading. After the first error everything else is skipped: every function below
// returns at once if the status is not OK, so that callers read as a list of what is bound, and
// check the status only where they use what was read.
typedef struct moe__loader {
    moe_model *model;
    const moe_gguf *gguf;
    moe_error *error;
    moe_status status;
    uint8_t *used; // per tensor of the file: somebody has asked for it
} moe__loader;

// Zeroed memory that lives as long as the model; NULL after an error. Allocations are a list
// whose links lie in the first of 64 bytes before each; moe_model_close frees it.
MOE__PRIVATE void *moe__load_alloc(moe__loader *loader, uint64_t count, uint64_t size) {
    uint64_t bytes;
    void *memory = NULL;
    if (loader->status) return NULL;
    if (moe__size_mul(count, size, &bytes) && bytes < SIZE_MAX / 4)
        memory = moe__alloc(&loader->model->allocator, (size_t)bytes + 64);
    if (!memory) {
        moe__load_fail(loader, MOE_ERROR_MEMORY, "model", "no memory for the model's tables");
        return NULL;
    }
    memcpy(memory, &loader->model->owned, sizeof(void *));
    loader->model->owned = memory;
    return (char *)memory + 64;
}

// ---- keys ------------------------------------------------------------------------------------

enum { MOE__REQUIRED = -1 }; // in place of a default

MOE__INLINE int moe__has(const moe_model *model, unsigned feature) {
    return (model->family->features & feature) != 0;
}

// The value of "family.name"; *key gets the full name.
MOE__PRIVATE const moe_gguf_value *moe__load_value(moe__loader *loader, const char *name,
                                                   char key[128]) {
    snprintf(key, 128, "%s.%s", loader->model->family->name, name);
    return loader->status ? NULL : moe_gguf_find_value(loader->gguf, key);
}

MOE__INLINE int moe__load_is_array(const moe_gguf_value *value) {
    return value->type == MOE_VALUE_ARRAY;
}

// An integer key within low..high, of layer il if it is an array; il -1: of all layers alike.
// Absent or 0 ("not set" in some files): the default, or an error if that is MOE__REQUIRED. The
// bounds are what keeps hostile sizes out: every product of two such numbers fits into int64_t.
MOE__PRIVATE int32_t moe__load_int_at(moe__loader *loader, const char *name, int il, int64_t low,
                                      int64_t high, int64_t fallback) {
    char key[128];
    int64_t x = 0, other;
    const moe_gguf_value *value = moe__load_value(loader, name, key);
    if (loader->status) return 0;
    const uint64_t at = value && il > 0 && moe__load_is_array(value) ? (uint64_t)il : 0;
    if (value && il >= 0 && moe__load_is_array(value) &&
        value->count != (uint64_t)loader->model->n_blocks)
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s has %llu values for %d layers", key,
                       (unsigned long long)value->count, loader->model->n_blocks);
    else if (value && !moe_gguf_value_int(value, at, &x))
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is not an integer", key);
    for (uint64_t i = 1; value && il < 0 && i < value->count && !loader->status; i++)
        if (!moe_gguf_value_int(value, i, &other) || other != x)
            moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, key, "%s differs from layer to layer",
                           key);
    if (loader->status) return 0;
    if (x == 0) {
        if (fallback != MOE__REQUIRED) return (int32_t)fallback;
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is missing", key);
        return 0;
    }
    if (x < low || x > high) {
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is %lld, not within %lld..%lld", key,
                       (long long)x, (long long)low, (long long)high);
        return 0;
    }
    return (int32_t)x;
}
MOE__PRIVATE int32_t moe__load_int(moe__loader *loader, const char *name, int64_t low, int64_t high,
                                   int64_t fallback) {
    return moe__load_int_at(loader, name, -1, low, high, fallback);
}

// A real key; absent or 0: the default. NaN, infinity and negative values are refused.
MOE__PRIVATE double moe__load_float(moe__loader *loader, const char *name, double fallback) {
    char key[128];
    double x = 0;
    const moe_gguf_value *value = moe__load_value(loader, name, key);
    if (loader->status || !value) return fallback;
    if (!moe_gguf_value_float(value, 0, &x) || value->count != 1)
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is not a number", key);
    else if (!(x >= 0 && x <= 1e30))
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is %g, not a positive number", key, x);
    return x > 0 ? x : fallback;
}

MOE__PRIVATE int moe__load_bool(moe__loader *loader, const char *name, int fallback) {
    char key[128];
    int x = fallback;
    const moe_gguf_value *value = moe__load_value(loader, name, key);
    if (value && (!moe_gguf_value_bool(value, 0, &x) || value->count != 1))
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is neither true nor false", key);
    return x;
}

// ---- tensors ---------------------------------------------------------------------------------

// The tensor "blk.N.base.suffix" (layer >= 0) or "base.suffix", without a dot if the suffix is
// empty; it counts as used. NULL: absent, and an error if it is required.
MOE__PRIVATE const moe_gguf_tensor *moe__load_tensor(moe__loader *loader, int layer,
                                                     const char *base, const char *suffix,
                                                     int required) {
    char name[128];
    if (loader->status) return NULL;
    const char *dot = *suffix ? "." : "";
    if (layer >= 0)
        snprintf(name, sizeof name, "blk.%d.%s%s%s", layer, base, dot, suffix);
    else
        snprintf(name, sizeof name, "%s%s%s", base, dot, suffix);
    const int64_t i = moe__gguf_names_find(loader->gguf->names, loader->gguf->n_tensors, name);
    if (i >= 0) loader->used[i] = 1;
    if (i < 0 && required)
        moe__load_fail(loader, MOE_ERROR_FORMAT, name, "tensor %s is missing", name);
    return moe_gguf_tensor_at(loader->gguf, i);
}

MOE__PRIVATE int moe__load_shape_is(moe__loader *loader, const moe_gguf_tensor *tensor, int64_t n0,
                                    int64_t n1, int64_t n2) {
    const int64_t *ne = tensor->ne;
    if (ne[0] == n0 && ne[1] == n1 && ne[2] == n2 && ne[3] == 1) return 1;
    moe__load_fail(loader, MOE_ERROR_FORMAT, tensor->name,
                   "tensor %s is {%lld, %lld, %lld, %lld}, expected {%lld, %lld, %lld, 1}",
                   tensor->name, (long long)ne[0], (long long)ne[1], (long long)ne[2],
                   (long long)ne[3], (long long)n0, (long long)n1, (long long)n2);
    return 0;
}

// A small tensor {n0, n1} as floats, which take at most 8 times its bytes; NULL if absent or
// after an error.
MOE__PRIVATE const float *moe__load_vector(moe__loader *loader, int layer, const char *base,
                                           const char *suffix, int64_t n0, int64_t n1,
                                           int required) {
    const moe_gguf_tensor *tensor = moe__load_tensor(loader, layer, base, suffix, required);
    float *out;
    if (!tensor || !moe__load_shape_is(loader, tensor, n0, n1, 1)) return NULL;
    if (!moe_type_supported(tensor->type)) {
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, tensor->name,
                       "tensor %s has type %s, which is not supported", tensor->name,
                       moe_type_name(tensor->type));
        return NULL;
    }
    if (tensor->size / sizeof *out < (uint64_t)n0 * (uint64_t)n1 / 8) {
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, tensor->name,
                       "tensor %s has type %s, too coarse for a norm, a bias or a scale",
                       tensor->name, moe_type_name(tensor->type));
        return NULL;
    }
    out = (float *)moe__load_alloc(loader, (uint64_t)n0 * (uint64_t)n1, sizeof *out);
    if (!out || moe_type_dequantize(tensor->type, tensor->data, out, n1, n0, loader->error))
        return NULL;
    loader->model->info.n_params += n0 * n1;
    loader->model->info.n_bytes += (int64_t)tensor->size;
    loader->model->info.n_bytes_token += (int64_t)tensor->size;
    return out;
}

// Declares what a matrix reads, so that this vector will be there in the form it wants.
MOE__PRIVATE void moe__load_input(moe__loader *loader, moe__matrix *matrix, moe__input input) {
    moe_model *model = loader->model;
    matrix->input = input;
    if (input == MOE__IN_NONE || !matrix->data) return;
    model->kinds[input] |= 1u << matrix->type->act;
    model->widest[input] = moe__max(model->widest[input], matrix->n_in);
}

// Whether base.scale is a factor of the matrix. That of an NVFP4 matrix always is: it belongs to
// the type, whose blocks have 8-bit scales of their own that need a common one. Of other types
// llama.cpp loads these but multiplies with them in some families only.
MOE__PRIVATE int moe__load_is_scaled(const moe_model *model, const char *base,
                                     const moe__type *type) {
    if (type->id == MOE_TYPE_NVFP4) return 1;
    if (!strcmp(base, "attn_gate")) return 0;
    if (!strncmp(base, "ffn_gate_inp", 12) || strncmp(base, "ffn_", 4)) return 1;
    return moe__has(model, MOE__FFN_SCALE);
}

// base.scale: a factor per matrix, or {1} for all heads. NULL: none.
MOE__PRIVATE const float *moe__load_scale(moe__loader *loader, const moe__matrix *matrix,
                                          int layer, const char *base) {
    const int64_t n = matrix->n_expert;
    if (!moe__load_is_scaled(loader->model, base, matrix->type)) return NULL;
    const moe_gguf_tensor *tensor = moe__load_tensor(loader, layer, base, "scale", 0);
    if (!tensor || tensor->ne[0] != 1 || n == 1 || strncmp(base, "attn_", 5))
        return moe__load_vector(loader, layer, base, "scale", n, 1, 0);
    const float *one = moe__load_vector(loader, layer, base, "scale", 1, 1, 1);
    float *all = (float *)moe__load_alloc(loader, (uint64_t)n, sizeof *all);
    for (int64_t i = 0; i < n && one && all; i++) all[i] = *one;
    return all;
}

// Binds matrix to base.weight {n_in, n_out, n_expert}, which reads `input`, with its scale and
// bias if there are any. Absent and not required: matrix->data stays NULL. per_token: the share
// of its bytes that one token reads, n_expert_used / n_expert of routed experts; it is counted in
// info.n_bytes_token, which times the tokens per second is the bandwidth that generating takes.
MOE__PRIVATE int moe__load_matrix(moe__loader *loader, moe__matrix *matrix, int layer,
                                  const char *base, moe__input input, int64_t n_in, int64_t n_out,
                                  int64_t n_expert, double per_token, int required) {
    const moe_gguf_tensor *tensor = moe__load_tensor(loader, layer, base, "weight", required);
    if (!tensor) return 0;
    // attn_kv_b, and k_b and v_b in some files: the heads' rows follow one another in 2-D.
    int folded = n_expert > 1 && tensor->ne[2] == 1 && tensor->ne[1] == n_out * n_expert &&
                 !strncmp(base, "attn_", 5);
    if (!moe__load_shape_is(loader, tensor, n_in, folded ? n_out * n_expert : n_out,
                            folded ? 1 : n_expert))
        return 0;
    const moe__type *type = moe__type_find(tensor->type);
    if (!type || !tensor->data) {
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, tensor->name,
                       "tensor %s has type %s (id %d), which is not supported", tensor->name,
                       moe_type_name(tensor->type), (int)tensor->type);
        return 0;
    }
    if (n_out % type->rows || (type->rows > 1 && !strcmp(base, "token_embd"))) {
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, tensor->name,
                       "tensor %s: %s interleaves %d rows, and these are not read by such groups",
                       tensor->name, type->name, (int)type->rows);
        return 0;
    }
    matrix->data = (const uint8_t *)tensor->data;
    matrix->type = type;
    matrix->index = (int)(type - moe__types);
    matrix->n_in = n_in;
    matrix->n_out = n_out;
    matrix->n_expert = n_expert;
    moe__load_input(loader, matrix, input);
    matrix->row_size = moe_type_row_size(tensor->type, n_in);
    matrix->expert_size = matrix->row_size * (size_t)n_out;
    matrix->scale = moe__load_scale(loader, matrix, layer, base);
    matrix->bias = NULL; // a row of token_embd is read as it is
    if (strcmp(base, "token_embd"))
        matrix->bias = moe__load_vector(loader, layer, base, "bias", n_out, n_expert, 0);
    matrix->bias_stride = n_out;
    loader->model->info.n_params += n_in * n_out * n_expert;
    loader->model->info.n_bytes += (int64_t)tensor->size;
    loader->model->info.n_bytes_token += (int64_t)(per_token * (double)tensor->size);
    return !loader->status;
}

// The same from files that hold one tensor per expert, base.E.weight: Mixtral's first ones. They
// need not follow one another in the file: the matrix gets a list of where each expert lies.
MOE__PRIVATE int moe__load_split(moe__loader *loader, moe__matrix *matrix, int layer,
                                 const char *base, moe__input input, int64_t n_in, int64_t n_out,
                                 int64_t n_expert, double per_token) {
    const uint8_t **experts =
        (const uint8_t **)moe__load_alloc(loader, (uint64_t)n_expert, sizeof *experts);
    for (int e = 0; e < n_expert; e++) {
        moe__matrix one;
        char name[64];
        memset(&one, 0, sizeof one);
        snprintf(name, sizeof name, "%s.%d", base, e);
        if (!moe__load_matrix(loader, &one, layer, name, input, n_in, n_out, 1, per_token, 1))
            return 0;
        if (e == 0) *matrix = one;
        if (one.type != matrix->type || one.scale || one.bias) {
            snprintf(name, sizeof name, "blk.%d.%s.%d.weight", layer, base, e);
            moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, name,
                           "tensor %s has another type than expert 0, a scale or a bias", name);
            return 0;
        }
        experts[e] = one.data;
    }
    matrix->n_expert = n_expert;
    matrix->experts = experts;
    return 1;
}

// Rows first .. first + n - 1 of every expert's matrix as a matrix of its own. Rows of interleaved
// types (_R4, _R8) come in groups that lie mixed with each other: only whole groups can be cut out.
MOE__PRIVATE moe__matrix moe__load_slice(moe__loader *loader, const moe__matrix *whole,
                                         int64_t first, int64_t n) {
    moe__matrix slice = *whole;
    if (first % whole->type->rows || n % whole->type->rows)
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, "model",
                       "%s interleaves rows of tensors that are parts of one",
                       whole->type->name);
    slice.data += (size_t)first * whole->row_size;
    slice.n_out = n;
    if (slice.bias) slice.bias += first;
    return slice;
}

// ---- hyper-parameters ------------------------------------------------------------------------

// The keys that are read, with FAMILY. in front (spec: GGUF's list of keys, llama.cpp's loader).
// "each": a number, or an array with one per layer. Without a default the key must be there.
//
//   block_count, nextn_predict_layers (0)     layers, and how many at the end are not run: they
//                                             predict tokens further ahead
//   context_length, embedding_length          n_ctx_train, n_embd
//   attention.head_count, .head_count_kv      each; (head_count)
//   attention.key_length, .value_length       each; (embedding_length / head_count)
//   attention.key_length_mla, .value_length_mla, .kv_lora_rank, .q_lora_rank: latent attention,
//                                             where key_length is that of a cached row
//   attention.layer_norm_rms_epsilon          of all norms
//   attention.sliding_window, .sliding_window_pattern: how many keys, in which layers
//   attention.clamp_kqv, .scale, .temperature_scale, .temperature_length: of some families
//   rope.dimension_count (key_length)         how many values of a head are turned
//   rope.freq_base (10000), rope.freq_base_swa (freq_base)
//   rope.scaling.type (linear), .factor (1), .original_context_length, .attn_factor, .yarn_...
//   feed_forward_length                       each; of dense layers, or of experts
//   expert_feed_forward_length, expert_shared_feed_forward_length, leading_dense_block_count (0)
//   expert_count, expert_used_count, expert_shared_count, expert_group_count (1),
//   expert_group_used_count, expert_gating_func, expert_weights_norm (0), expert_weights_scale (1)
//   embedding_scale, residual_scale, logit_scale: of Granite

MOE__PRIVATE void moe__load_check_base(moe__loader *loader, const char *key,
                                       const moe__rope_scaling *s) {
    if (!(s->base > 1) || !(s->factor > 1e-6))
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "rope base %g or factor %g is out of range",
                       s->base, s->factor);
}

// How positions are scaled for contexts longer than those of the training: not at all, "linear"
// (all of them divided by a factor) or "yarn" (moe__rope_init). *magnitude: the factor of cos and
// sin that goes with it.
MOE__PRIVATE void moe__load_rope_scaling(moe__loader *loader, moe__rope_scaling *s,
                                         double *magnitude) {
    char key[128];
    moe_string type;
    const void *cursor = NULL;
    memset(s, 0, sizeof *s);
    type.data = "linear"; // without a factor: no scaling
    type.size = 6;
    const moe_gguf_value *value = moe__load_value(loader, "rope.scaling.type", key);
    if (value && !moe_gguf_value_string(value, &cursor, &type))
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is not a string", key);
    s->base = moe__load_float(loader, "rope.freq_base", 10000);
    s->factor = moe__load_float(loader, "rope.scaling.factor",
                                moe__load_float(loader, "rope.scale_linear", 1));
    s->original_ctx = moe__load_int(loader, "rope.scaling.original_context_length", 1, INT32_MAX,
                                    loader->model->info.n_ctx_train);
    s->beta_fast = moe__load_float(loader, "rope.scaling.yarn_beta_fast", 32);
    s->beta_slow = moe__load_float(loader, "rope.scaling.yarn_beta_slow", 1);
    s->ext_factor = 1;
    *magnitude = moe__load_float(loader, "rope.scaling.attn_factor", 1);
    if (type.size == 4 && !memcmp(type.data, "none", 4)) {
        s->factor = 1;
    } else if (type.size == 4 && !memcmp(type.data, "yarn", 4)) {
        s->yarn = 1;
    } else if (type.size != 6 || memcmp(type.data, "linear", 6)) {
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, key, "rope scaling \"%.*s\" is not supported",
                       (int)moe__utf8_limit(type.data, type.size, 32), type.data);
    }
    moe__load_check_base(loader, "rope.freq_base", s);
}

// rope_freqs (or NULL) divide the frequencies.
MOE__PRIVATE void moe__load_rope(moe__loader *loader, int id, int32_t n_rot,
                                 const moe__rope_scaling *s, double magnitude,
                                 const float *factors) {
    moe_model *model = loader->model;
    moe__rope *rope = &model->ropes[id];
    rope->kind = model->family->rope;
    rope->n_rot = n_rot;
    rope->magnitude = magnitude;
    rope->table_at = model->n_rope;
    rope->frequency =
        (double *)moe__load_alloc(loader, (uint64_t)n_rot / 2 + 1, sizeof *rope->frequency);
    if (loader->status) return;
    model->n_rope += n_rot;
    moe__rope_init(rope, s);
    for (int i = 0; factors && i < n_rot / 2; i++) {
        rope->frequency[i] /= factors[i];
        if (!(fabs(rope->frequency[i]) <= 1e30))
            moe__load_fail(loader, MOE_ERROR_FORMAT, "rope_freqs.weight",
                           "tensor rope_freqs.weight holds %g", (double)factors[i]);
    }
}

// Positions, and the factor of query . key that goes with them. YaRN multiplies cos and sin by a
// magnitude m, so that scores grow by m^2: softmax over more keys than the model was trained with
// stays as sharp. Layers with a window may have a rope of their own, without scaling (they never
// see far) or with another base; some layers of some families have none.
MOE__PRIVATE void moe__load_ropes(moe__loader *loader) {
    moe_model *model = loader->model;
    moe__layer *layers = model->layers;
    const int mla = model->family->mixer == MOE__MLA;
    moe__rope_scaling s;
    double attn_factor, magnitude, kq_scale = 1, attention_scale = 0;
    int32_t narrowest = loader->status ? 2 : layers[0].head_k;
    moe__load_rope_scaling(loader, &s, &attn_factor);
    magnitude = attn_factor * (s.yarn ? 1 + 0.1 * log(s.factor) : 1);
    if (mla) {
        // DeepSeek's mscale is, squared, in the scores and not in cos and sin; if the file does
        // not say how large it is, it has YaRN's own size and is in both.
        double more = moe__load_float(loader, "rope.scaling.yarn_log_multiplier", 0);
        if (more > 0 || !s.yarn) magnitude = attn_factor;
        else more = 0.1;
        kq_scale = pow(attn_factor * (1 + more * log(s.factor)), 2);
    }
    if (moe__has(model, MOE__SCALES))
        attention_scale = moe__load_float(loader, "attention.scale", 0);
    for (int il = 1; il < model->info.n_layer && !loader->status; il++)
        narrowest = (int32_t)moe__min(narrowest, layers[il].head_k);
    const int32_t n_rot = moe__load_int(loader, "rope.dimension_count", 2, narrowest,
                                        mla ? MOE__REQUIRED : narrowest);
    if (!loader->status && (n_rot % 2 || (mla && n_rot >= narrowest)))
        moe__load_fail(loader, MOE_ERROR_FORMAT, "rope.dimension_count",
                       "%d rotated values do not fit heads of %d", n_rot, narrowest);
    const int32_t n_swa =
        moe__load_int(loader, "rope.dimension_count_swa", 2, MOE__MAX_HEAD, n_rot);
    for (int il = 0; il < model->info.n_layer && !loader->status && n_swa != n_rot; il++)
        if (layers[il].window)
            moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, "rope.dimension_count_swa",
                           "%d rotated values in layers with a window, %d in others", n_swa,
                           n_rot);
    const float *factors = moe__load_vector(loader, -1, "rope_freqs", "weight", n_rot / 2, 1, 0);
    moe__load_rope(loader, MOE__ROPE_FULL, n_rot, &s, magnitude, factors);
    if (moe__has(model, MOE__PLAIN_SLIDING)) {
        s.yarn = 0, s.factor = 1;
        moe__load_rope(loader, MOE__ROPE_SLIDING, n_rot, &s, 1, NULL);
    } else if (moe__has(model, MOE__BASE_SLIDING)) {
        const double base = s.base;
        s.base = moe__load_float(loader, "rope.freq_base_swa", base);
        moe__load_check_base(loader, "rope.freq_base_swa", &s);
        if (s.base != base)
            moe__load_rope(loader, MOE__ROPE_SLIDING, n_rot, &s, magnitude, factors);
    }
    const int sliding = model->ropes[MOE__ROPE_SLIDING].n_rot > 0;
    for (int il = 0; il < model->info.n_layer && !loader->status; il++) {
        const int other = layers[il].window && sliding;
        const int none = (moe__has(model, MOE__NOPE_FULL) && !layers[il].window) ||
                         (moe__has(model, MOE__NOPE_FOURTH) && il % 4 == 3);
        layers[il].rope = none ? NULL : &model->ropes[other ? MOE__ROPE_SLIDING : MOE__ROPE_FULL];
        layers[il].n_rot = n_rot;
        layers[il].kq_scale = (float)(attention_scale > 0
                                          ? attention_scale
                                          : kq_scale / sqrt((double)layers[il].head_k));
    }
}

// Groups of experts of which only the best take part: any family may have them. DeepSeek-V3 keeps
// the experts of a group on one machine and asks few machines per token; when all are in one
// memory, groups are just a part of the definition of which experts are chosen.
MOE__PRIVATE void moe__load_groups(moe__loader *loader) {
    const moe_model_info *info = &loader->model->info;
    moe__router *router = &loader->model->router;
    router->n_group = moe__load_int(loader, "expert_group_count", 1, info->n_expert, 1);
    if (loader->status || router->n_group == 1) return;
    router->n_group_used =
        moe__load_int(loader, "expert_group_used_count", 1, router->n_group, MOE__REQUIRED);
    if (!loader->status && (info->n_expert % router->n_group ||
                            info->n_expert / router->n_group * router->n_group_used <
                                info->n_expert_used))
        moe__load_fail(loader, MOE_ERROR_FORMAT, "expert_group_count",
                       "%d experts in %d groups, %d used, do not give %d experts",
                       info->n_expert, router->n_group, router->n_group_used,
                       info->n_expert_used);
}

// How experts are chosen: by keys if the family has them (MOE__ROUTER_KEYS), else by its row in the
// table. What is added to the residual is scaled by the model's residual_scale, which the weights
// take up here: no extra pass.
MOE__PRIVATE void moe__load_router(moe__loader *loader) {
    moe_model *model = loader->model;
    moe__router *router = &model->router;
    moe_model_info *info = &model->info;
    info->n_expert = moe__load_int(loader, "expert_count", 1, MOE__MAX_EXPERTS, 0);
    if (!loader->status && !info->n_expert)
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, "expert_count",
                       "model family \"%s\" without experts is not supported", info->family);
    info->n_expert_used =
        moe__load_int(loader, "expert_used_count", 1, info->n_expert, MOE__REQUIRED);
    router->n_expert = info->n_expert;
    router->n_used = info->n_expert_used;
    router->gating = (moe__gating)model->family->gating;
    router->normalize = moe__has(model, MOE__NORMALIZE);
    router->scale = model->residual_scale;
    moe__load_groups(loader);
    if (!moe__has(model, MOE__ROUTER_KEYS) || loader->status) return;
    // GLM-4.7-Flash (47 layers, or 48 with its prediction layer) leaves the key out.
    int glm_flash = model->family->mixer == MOE__MLA && info->n_layer >= 47 && info->n_layer <= 48;
    int gating = moe__load_int(loader, "expert_gating_func", 1, 4,
                               glm_flash                ? MOE__GATING_SIGMOID
                               : model->family->gating  ? model->family->gating
                                                        : MOE__REQUIRED);
    if (gating > MOE__GATING_CHOSEN)
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, "expert_gating_func",
                       "expert gating function %d is not supported", gating);
    router->gating = (moe__gating)gating;
    router->normalize = moe__load_bool(loader, "expert_weights_norm", 0);
    router->scale *= (float)moe__load_float(loader, "expert_weights_scale", 1);
}

// Heads of layer il. Without widths a head is n_embd / n_head values wide, with n_head of the first
// layer, as llama.cpp has it. Latent attention has two widths: that of the keys it computes with
// (_mla) and that of the rows it caches.
MOE__PRIVATE void moe__load_heads(moe__loader *loader, moe__layer *layer, int il) {
    const moe_model *model = loader->model;
    const moe__layer *first = model->layers; // by whose heads the default width is found
    layer->mixer = model->family->mixer;
    layer->n_head = moe__load_int_at(loader, "attention.head_count", il, 1, MOE__MAX_HEADS,
                                     MOE__REQUIRED);
    if (loader->status) return;
    layer->n_head_kv = moe__load_int_at(loader, "attention.head_count_kv", il, 1, layer->n_head,
                                        layer->n_head);
    const int64_t head = model->info.n_embd / first->n_head;
    layer->head_k = moe__load_int_at(loader, "attention.key_length", il, 1, MOE__MAX_HEAD, head);
    layer->head_v = moe__load_int_at(loader, "attention.value_length", il, 1, MOE__MAX_HEAD, head);
    if (layer->mixer == MOE__MLA) {
        layer->head_k = moe__load_int(loader, "attention.key_length_mla", 1, MOE__MAX_HEAD,
                                      layer->head_k);
        layer->head_v = moe__load_int(loader, "attention.value_length_mla", 1, MOE__MAX_HEAD,
                                      layer->head_v);
        layer->kv_lora = moe__load_int(loader, "attention.kv_lora_rank", 1, 1 << 16,
                                       MOE__REQUIRED);
        // Whether queries are low-rank shows in the tensors; the rank must then be known.
        if (!moe_gguf_find_tensor(loader->gguf, "blk.0.attn_q.weight"))
            layer->q_lora = moe__load_int(loader, "attention.q_lora_rank", 1, 1 << 16,
                                          MOE__REQUIRED);
    } else if (!loader->status && layer->n_head % layer->n_head_kv) {
        moe__load_fail(loader, MOE_ERROR_FORMAT, "attention.head_count_kv",
                       "%d heads cannot share %d key-value heads", layer->n_head,
                       layer->n_head_kv);
    }
    if (!loader->status && (layer->head_k < 2 || layer->head_v < 1))
        moe__load_fail(loader, MOE_ERROR_FORMAT, "attention.key_length",
                       "heads of %d and %d values", layer->head_k, layer->head_v);
}

// Whether layer il has a sliding window: by the key, an array or a period of which the last
// layer has none (0: all have one), or by the family's period.
MOE__PRIVATE int moe__load_is_sliding(moe__loader *loader, int il) {
    char key[128];
    int64_t period = loader->model->family->window_period, x = 0;
    const moe_gguf_value *value =
        moe__load_value(loader, "attention.sliding_window_pattern", key);
    if (value && moe__load_is_array(value)) { // a missing tail: no windows
        if ((uint64_t)il < value->count && !moe_gguf_value_int(value, (uint64_t)il, &x))
            moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s does not hold integers", key);
        return x != 0;
    }
    if (value && (!moe_gguf_value_int(value, 0, &period) || period < 0))
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is not a period", key);
    return period <= 0 || il % period < period - 1;
}

// Layers with a window must have heads like the others.
MOE__PRIVATE void moe__load_check_sliding(moe__loader *loader) {
    const moe__layer *first = loader->model->layers;
    static const char *const names[2][2] = {
        {"attention.key_length_swa", "attention.value_length_swa"},
        {"attention.key_length", "attention.value_length"}};
    for (int i = 0; i < 2 && !loader->status; i++) {
        const int32_t all = i ? first->head_v : first->head_k;
        const int32_t own = moe__load_int(loader, names[0][i], 1, MOE__MAX_HEAD, all);
        if (own != all)
            moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, names[0][i],
                           "%s is %d, which is not supported if %s is %d", names[0][i], own,
                           names[1][i], all);
    }
}

// Head counts, widths and windows of all layers, before anything is bound: binding is checked
// against them.
MOE__PRIVATE void moe__load_layers(moe__loader *loader) {
    moe_model *model = loader->model;
    moe_model_info *info = &model->info;
    int32_t window = 0;
    float clamp_kqv = 0;
    model->layers = (moe__layer *)moe__load_alloc(loader, (uint64_t)info->n_layer,
                                                  sizeof *model->layers);
    if (moe__has(model, MOE__CLAMP_KQV))
        clamp_kqv = (float)moe__load_float(loader, "attention.clamp_kqv", 0);
    if (model->family->window_period)
        window = moe__load_int(loader, "attention.sliding_window", 1, INT32_MAX,
                               moe__has(model, MOE__ALL_KEYS) ? 0 : MOE__REQUIRED);
    for (int il = 0; il < info->n_layer && !loader->status; il++) {
        moe__layer *layer = &model->layers[il];
        moe__load_heads(loader, layer, il);
        layer->clamp_kqv = clamp_kqv;
        if (window && moe__load_is_sliding(loader, il)) layer->window = window;
    }
    if (window) moe__load_check_sliding(loader);
    if (loader->status) return;
    info->n_head = model->layers[0].n_head;
    info->n_head_kv = model->layers[0].n_head_kv;
}

// Queries far from the start may be sharpened: scores times 1 + scale ln(1 + floor(p / length)) for
// the query at position p. Files that do not want it have 0, or no keys.
MOE__PRIVATE void moe__load_temperature(moe__loader *loader) {
    const moe_model *model = loader->model;
    if (model->family->mixer != MOE__MLA) return;
    const double scale = moe__load_float(loader, "attention.temperature_scale", 0);
    if (!(scale > 0)) return;
    const int32_t length =
        moe__load_int(loader, "attention.temperature_length", 1, INT32_MAX, MOE__REQUIRED);
    for (int il = 0; il < model->info.n_layer && !loader->status; il++) {
        model->layers[il].temperature = scale;
        model->layers[il].temperature_length = length;
    }
}

// Factors of embeddings, of what is added to the residual, and of logits. Most families have none,
// and then nothing is multiplied: x * 1 has the bits of x, but takes a pass.
MOE__PRIVATE void moe__load_scales(moe__loader *loader) {
    moe_model *model = loader->model;
    model->embd_scale = model->residual_scale = model->logit_scale = 1;
    if (moe__has(model, MOE__EMBD_ROOT)) model->embd_scale = sqrtf((float)model->info.n_embd);
    if (!moe__has(model, MOE__SCALES)) return;
    model->embd_scale = (float)moe__load_float(loader, "embedding_scale", 1);
    model->residual_scale = (float)moe__load_float(loader, "residual_scale", 1);
    model->logit_scale = (float)(1 / moe__load_float(loader, "logit_scale", 1));
}

// All keys, in the order in which they depend on each other: sizes, layers, positions, router,
// widths of the feed-forward parts. The width of experts has three sources: a key of its own, the
// key of dense layers (MOE__WIDTH_FFN), or, in files of Qwen1.5-MoE, that divided by the experts
// in use. Wrong guesses do not get far: the tensors' shapes are checked against it.
MOE__PRIVATE void moe__load_hparams(moe__loader *loader) {
    moe_model *model = loader->model;
    moe_model_info *info = &model->info;
    int32_t blocks = moe__load_int(loader, "block_count", 1, MOE__MAX_LAYERS, MOE__REQUIRED);
    info->n_layer = model->n_blocks = blocks;
    // Prediction layers at the end are not run.
    info->n_layer -= moe__load_int(loader, "nextn_predict_layers", 1, blocks - 1, 0);
    info->n_ctx_train = moe__load_int(loader, "context_length", 1, INT32_MAX, MOE__REQUIRED);
    info->n_embd = moe__load_int(loader, "embedding_length", 1, 1 << 20, MOE__REQUIRED);
    char key[128];
    if (!loader->status && !moe__load_value(loader, "attention.layer_norm_rms_epsilon", key))
        moe__load_fail(loader, MOE_ERROR_FORMAT, key, "%s is missing", key);
    model->eps = (float)moe__load_float(loader, "attention.layer_norm_rms_epsilon", 0);
    if (!moe__load_bool(loader, "attention.causal", 1))
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, "attention.causal",
                       "attention to later tokens is not supported");
    moe__load_layers(loader);
    moe__load_ropes(loader);
    moe__load_temperature(loader);
    moe__load_scales(loader);
    moe__load_router(loader);
    info->n_ff = moe__load_int_at(loader, "feed_forward_length", 0, 1, 1 << 24, 0);
    info->n_ff_exp = info->n_ff;
    if (moe__has(model, MOE__SHARED_GATED) && !loader->status) {
        info->n_ff_exp = info->n_ff / info->n_expert_used; // Qwen1.5-MoE without the key
        info->n_expert_shared = 1;
        model->n_ff_shared = moe__load_int(loader, "expert_shared_feed_forward_length", 1, 1 << 24,
                                           info->n_ff ? info->n_ff : MOE__REQUIRED);
    }
    if (!moe__has(model, MOE__WIDTH_FFN))
        info->n_ff_exp =
            moe__load_int(loader, "expert_feed_forward_length", 1, 1 << 24, info->n_ff_exp);
    if (moe__has(model, MOE__ROUTER_KEYS))
        model->n_dense =
            moe__load_int(loader, "leading_dense_block_count", 1, info->n_layer, 0);
    if (moe__has(model, MOE__SHARED_COUNT)) {
        info->n_expert_shared = moe__load_int(loader, "expert_shared_count", 1, 64, 0);
        model->n_ff_shared = info->n_expert_shared
                                 ? (int32_t)moe__min((int64_t)info->n_ff_exp *
                                                         info->n_expert_shared, 1 << 28)
                                 : 0;
    }
    if (moe__has(model, MOE__SHARED_WIDTH)) { // exaone-moe: as wide as a routed one by default
        model->n_ff_shared = moe__load_int(loader, "expert_shared_feed_forward_length", 1, 1 << 24,
                                           moe__has(model, MOE__WIDTH_FFN) ? 0 : info->n_ff_exp);
        info->n_expert_shared = model->n_ff_shared > 0;
    }
    if (!loader->status && (info->n_ff_exp < 1 || (model->n_dense && info->n_ff < 1)))
        moe__load_fail(loader, MOE_ERROR_FORMAT, "feed_forward_length",
                       "the width of the feed-forward layers is missing");
}

// ---- feed-forward parts ----------------------------------------------------------------------

// down(activation(gate x) * up x) of so many experts, whose hidden vectors are `hidden`. Gate and
// up are separate tensors or one, gate first; experts are one 3-D tensor or, in early files, as
// many 2-D ones.
MOE__PRIVATE void moe__load_ffn(moe__loader *loader, moe__ffn *ffn, int il, const char *suffix,
                                moe__input hidden, int64_t n_ff, int64_t n_expert,
                                double per_token, int required) {
    const int64_t n_embd = loader->model->info.n_embd, n = n_expert;
    const moe__input x = MOE__IN_NORMED;
    const double part = per_token;
    char gate[32], up[32], down[32], gate_up[32];
    moe__matrix fused;
    snprintf(gate, sizeof gate, "ffn_gate%s", suffix);
    snprintf(up, sizeof up, "ffn_up%s", suffix);
    snprintf(down, sizeof down, "ffn_down%s", suffix);
    snprintf(gate_up, sizeof gate_up, "ffn_gate_up%s", suffix);
    memset(&fused, 0, sizeof fused);
    ffn->oai = moe__has(loader->model, MOE__OAI);
    if (!strcmp(suffix, "_exps") && moe__load_tensor(loader, il, "ffn_gate.0", "weight", 0)) {
        moe__load_split(loader, &ffn->gate, il, "ffn_gate", x, n_embd, n_ff, n, part);
        moe__load_split(loader, &ffn->up, il, "ffn_up", x, n_embd, n_ff, n, part);
        moe__load_split(loader, &ffn->down, il, "ffn_down", hidden, n_ff, n_embd, n, part);
        return;
    }
    if (moe__load_matrix(loader, &fused, il, gate_up, x, n_embd, 2 * n_ff, n, part, 0)) {
        ffn->gate = moe__load_slice(loader, &fused, 0, n_ff);
        ffn->up = moe__load_slice(loader, &fused, n_ff, n_ff);
    } else {
        if (!moe__load_matrix(loader, &ffn->gate, il, gate, x, n_embd, n_ff, n, part, required))
            return;
        moe__load_matrix(loader, &ffn->up, il, up, x, n_embd, n_ff, n, part, 1);
    }
    moe__load_matrix(loader, &ffn->down, il, down, hidden, n_ff, n_embd, n, part, 1);
}

// What a layer holds beside its mixer, whose head counts are known by then: norms, and either the
// router with routed and shared experts, or one dense network.
MOE__PRIVATE void moe__load_layer(moe__loader *loader, moe__layer *layer, int il) {
    const moe_model *model = loader->model;
    const moe_model_info *info = &model->info;
    const int64_t n_embd = info->n_embd;
    layer->attn_norm = moe__load_vector(loader, il, "attn_norm", "weight", n_embd, 1, 1);
    layer->ffn_norm = moe__load_vector(loader, il, model->family->ffn_norm, "weight", n_embd, 1, 1);
    if (moe__has(model, MOE__POST_NORMS)) {
        layer->attn_post_norm =
            moe__load_vector(loader, il, "post_attention_norm", "weight", n_embd, 1, 1);
        layer->ffn_post_norm =
            moe__load_vector(loader, il, "post_ffw_norm", "weight", n_embd, 1, 1);
    }
    layer->is_moe = il >= model->n_dense;
    if (!layer->is_moe) {
        const int32_t n_ff = moe__load_int_at(loader, "feed_forward_length", il, 1, 1 << 24,
                                              MOE__REQUIRED);
        moe__load_ffn(loader, &layer->dense, il, "", MOE__IN_DENSE, n_ff, 1, 1, 1);
        return;
    }
    const double share = (double)info->n_expert_used / info->n_expert;
    moe__load_matrix(loader, &layer->router, il, "ffn_gate_inp", MOE__IN_NORMED, n_embd,
                     info->n_expert, 1, 1, 1);
    if (moe__has(model, MOE__ROUTER_KEYS)) { // some files leave ".bias" out of the name
        layer->probs_bias =
            moe__load_vector(loader, il, "exp_probs_b", "bias", info->n_expert, 1, 0);
        if (!layer->probs_bias)
            layer->probs_bias =
                moe__load_vector(loader, il, "exp_probs_b", "", info->n_expert, 1, 0);
    }
    moe__load_ffn(loader, &layer->experts, il, "_exps", MOE__IN_ROUTED, info->n_ff_exp,
                  info->n_expert, share, 1);
    if (model->n_ff_shared)
        moe__load_ffn(loader, &layer->shared, il, "_shexp", MOE__IN_SHARED, model->n_ff_shared, 1,
                      1, 1);
    if (moe__has(model, MOE__SHARED_GATED))
        layer->shared_gate =
            moe__load_vector(loader, il, "ffn_gate_inp_shexp", "weight", n_embd, 1, 1);
}

// Families whose matrices have biases must not run without one.
MOE__PRIVATE void moe__load_check_biases(moe__loader *loader, const moe__layer *layer, int il) {
    const moe__matrix *const matrices[] = {
        &layer->q, &layer->k, &layer->v, &layer->o, &layer->router,
        &layer->experts.gate, &layer->experts.up, &layer->experts.down};
    static const char *const names[] = {"attn_q", "attn_k", "attn_v", "attn_output",
                                        "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps",
                                        "ffn_down_exps"};
    for (int i = 0; i < 8; i++)
        if (!matrices[i]->bias) moe__load_tensor(loader, il, names[i], "bias", 1);
}

// ---- the whole -------------------------------------------------------------------------------

// What no layer has: embeddings, the last norm, the output matrix. Many models use the embeddings
// for both ("tied"): then there is no output.weight. More rows than tokens are padding.
MOE__PRIVATE void moe__load_globals(moe__loader *loader) {
    moe_model *model = loader->model;
    moe_model_info *info = &model->info;
    const moe_gguf_tensor *embd = moe__load_tensor(loader, -1, "token_embd", "weight", 1);
    if (!embd) return;
    if (embd->ne[1] > INT32_MAX / 2)
        moe__load_fail(loader, MOE_ERROR_FORMAT, embd->name, "tensor %s has %lld rows", embd->name,
                       (long long)embd->ne[1]);
    info->n_vocab = (int32_t)embd->ne[1];
    int tied = !moe_gguf_find_tensor(loader->gguf, "output.weight");
    moe__load_matrix(loader, &model->token_embd, -1, "token_embd", MOE__IN_NONE, info->n_embd,
                     info->n_vocab, 1, tied ? 1 : 1.0 / info->n_vocab, 1);
    if (tied)
        model->output = model->token_embd;
    else
        moe__load_matrix(loader, &model->output, -1, "output", MOE__IN_NONE, info->n_embd,
                         info->n_vocab, 1, 1, 1);
    moe__load_input(loader, &model->output, MOE__IN_NORMED);
    model->output_norm =
        moe__load_vector(loader, -1, "output_norm", "weight", info->n_embd, 1, 1);
    if (!loader->status && model->vocab && moe_vocab_size(model->vocab) > info->n_vocab)
        moe__load_fail(loader, MOE_ERROR_FORMAT, "tokenizer.ggml.tokens",
                       "%d tokens, but the embedding has %d rows",
                       (int)moe_vocab_size(model->vocab), (int)info->n_vocab);
}

// Tensors that may stay unused: PREFIX...SUFFIX, if the tensor PREFIX...OTHER is used. Files are
// written with any others because they change what the model computes.
typedef struct moe__spare {
    const char *prefix, *suffix, *other;
} moe__spare;

static const moe__spare moe__spares[] = {
    // how large activations are, for kernels that round them to 4 bits
    {"", ".input_scale", ".weight"},
    // left out by llama.cpp, see moe__load_is_scaled: what counts is read
    {"blk.", ".attn_gate.scale", ".attn_gate.weight"},
    {"blk.", ".ffn_gate.scale", ".ffn_gate.weight"},
    {"blk.", ".ffn_up.scale", ".ffn_up.weight"},
    {"blk.", ".ffn_down.scale", ".ffn_down.weight"},
    {"blk.", ".ffn_gate_exps.scale", ".ffn_gate_exps.weight"},
    {"blk.", ".ffn_up_exps.scale", ".ffn_up_exps.weight"},
    {"blk.", ".ffn_down_exps.scale", ".ffn_down_exps.weight"},
    {"blk.", ".ffn_gate_up_exps.scale", ".ffn_gate_up_exps.weight"},
    {"blk.", ".ffn_gate_shexp.scale", ".ffn_gate_shexp.weight"},
    {"blk.", ".ffn_up_shexp.scale", ".ffn_up_shexp.weight"},
    {"blk.", ".ffn_down_shexp.scale", ".ffn_down_shexp.weight"},
    // the same as these two
    {"blk.", ".attn_kv_b.weight", ".attn_v_b.weight"},
    // what looks at images in files that hold both; text needs none of it
    {"v.", "", NULL},
    {"mm.", "", NULL},
};

MOE__PRIVATE int moe__load_is_spare(const moe__loader *loader, const char *name) {
    const moe_gguf *gguf = loader->gguf;
    const size_t size = strlen(name);
    for (size_t i = 0; i < sizeof moe__spares / sizeof moe__spares[0]; i++) {
        const moe__spare *s = &moe__spares[i];
        const size_t begin = strlen(s->prefix), end = strlen(s->suffix);
        char other[128];
        if (size <= begin + end || memcmp(name, s->prefix, begin) ||
            memcmp(name + size - end, s->suffix, end))
            continue;
        if (!s->other) return 1;
        snprintf(other, sizeof other, "%.*s%s", (int)(size - end), name, s->other);
        const int64_t at = moe__gguf_names_find(gguf->names, gguf->n_tensors, other);
        if (at >= 0 && loader->used[at]) return 1;
    }
    return 0;
}

// N of "blk.N."; -1: another name
MOE__PRIVATE int moe__load_layer_of(const char *name) {
    int n = 0, digits = 0;
    if (strncmp(name, "blk.", 4)) return -1;
    for (name += 4; *name >= '0' && *name <= '9' && digits < 6; name++, digits++)
        n = n * 10 + (*name - '0');
    return digits && *name == '.' ? n : -1;
}

// Every tensor must be used: one that is left out would change what comes out. So that this finds
// all, whoever looks for a tensor marks it as used by asking (moe__load_tensor).
MOE__PRIVATE void moe__load_check_used(moe__loader *loader) {
    const moe_model *model = loader->model;
    const char *first = NULL;
    char names[160];
    size_t size = 0;
    int64_t n = 0;
    names[0] = 0;
    for (int64_t i = 0; i < moe_gguf_n_tensors(loader->gguf) && !loader->status; i++) {
        const char *name = moe_gguf_tensor_at(loader->gguf, i)->name;
        const int layer = moe__load_layer_of(name);
        if (loader->used[i] || moe__load_is_spare(loader, name)) continue;
        if (layer >= model->info.n_layer && layer < model->n_blocks) continue; // predicts
        if (layer >= model->n_blocks)
            moe__load_fail(loader, MOE_ERROR_FORMAT, name,
                           "tensor %s is of a layer that block_count, %d, does not count", name,
                           (int)model->n_blocks);
        if (!first) first = name;
        if (size + strlen(name) + 3 < sizeof names)
            size += (size_t)snprintf(names + size, sizeof names - size, "%s%s", n ? ", " : "",
                                     name);
        n++;
    }
    if (n)
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, first,
                       "model family \"%s\" has no use for %" PRId64 " tensor%s: %s",
                       model->info.family, n, n == 1 ? "" : "s", names);
}

// The row of moe__families that the file names. Files of other kinds (adapters, importance
// matrices) say so in general.type.
MOE__PRIVATE void moe__load_family(moe__loader *loader) {
    moe_model *model = loader->model;
    moe_string name, type;
    const void *cursor = NULL;
    const moe_gguf_value *value = moe_gguf_find_value(loader->gguf, "general.type");
    if (value && moe_gguf_value_string(value, &cursor, &type) &&
        (type.size != 5 || memcmp(type.data, "model", 5))) {
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, "general.type",
                       "the file holds a \"%.*s\", not a model",
                       (int)moe__utf8_limit(type.data, type.size, 32), type.data);
        return;
    }
    cursor = NULL;
    value = moe_gguf_find_value(loader->gguf, "general.architecture");
    if (!moe_gguf_value_string(value, &cursor, &name)) {
        moe__load_fail(loader, MOE_ERROR_FORMAT, "general.architecture",
                       "general.architecture is missing or not a string");
        return;
    }
    for (size_t i = 0; i < sizeof moe__families / sizeof moe__families[0]; i++)
        if (name.size == strlen(moe__families[i].name) &&
            !memcmp(name.data, moe__families[i].name, name.size))
            model->family = &moe__families[i];
    if (!model->family) {
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, "general.architecture",
                       "model family \"%.*s\" is not supported",
                       (int)moe__utf8_limit(name.data, name.size, 48), name.data);
        return;
    }
    moe__base_copy_text(model->info.family, sizeof model->info.family, name.data, name.size);
    cursor = NULL;
    if (moe_gguf_value_string(moe_gguf_find_value(loader->gguf, "general.name"), &cursor, &name))
        moe__base_copy_text(model->info.name, sizeof model->info.name, name.data, name.size);
}

// ==============================================================================================
// >>cache
//
// What a sequence remembers, layer by layer, each in the shape its mixer asks for. Nothing is
// touched before it is needed: what no token has been stored in takes no memory.
//
// The position comes last but one, [head][position][width]: attention reads the keys of one head
// at one position after the other, and each head is a stream of its own through memory. A token
// of Qwen3-30B-A3B (48 layers, 4 heads of 128 + 128) takes 96 KiB in f16; one of DeepSeek-V3 (61
// layers, 512 + 64 values for all of its 128 heads), 69 KiB.
// ==============================================================================================

// Keys or values of one layer, [head][position][width]. MLA has one head, whose rows hold the
// latent vector and the rotated key, and no values of their own. A Q8_0 row is width / 32 blocks
// as in files: f16 scale, 32 int8. The widths of the parts of a row are multiples of 32.
typedef struct moe__kv {
    uint8_t *data;
    moe_kv_type type;
    int64_t n_ctx, width;
    size_t row_size;
} moe__kv;

MOE__INLINE uint8_t *moe__kv_row(const moe__kv *kv, int64_t head, int64_t position) {
    return kv->data + (size_t)(head * kv->n_ctx + position) * kv->row_size;
}

// Stores n values behind the first `at` of a row.
MOE__PRIVATE void moe__kv_store(const moe__kernels *kernels, const moe__kv *kv, uint8_t *row,
                                int64_t at, const float *x, int64_t n) {
    row += moe__kv_bytes(kv->type, at);
    if (kv->type == MOE_KV_F32)
        memcpy(row, x, (size_t)n * sizeof(float));
    else if (kv->type == MOE_KV_F16)
        kernels->f32_to_f16(x, n, (uint16_t *)(void *)row);
    else
        kernels->f32_to_q8_0(x, n, row);
}

// What a mixer keeps in a layer.
typedef struct moe__cache_shape {
    int64_t n_head; // rows per position, of keys and of values:
    int64_t k, v;   // so many values each; 0: there are none
    int64_t part;   // of a row of keys, stored by itself; the rest is another part
} moe__cache_shape;

typedef struct moe__cache {
    moe__kv k, v;
} moe__cache;

MOE__PRIVATE moe__kv moe__kv_take(moe__arena *arena, moe_kv_type type, int64_t n_ctx,
                                  int64_t n_head, int64_t width) {
    moe__kv kv;
    kv.type = type;
    kv.n_ctx = n_ctx;
    kv.width = width;
    kv.row_size = moe__kv_bytes(type, width);
    kv.data = (uint8_t *)moe__arena_take(arena, (uint64_t)(n_head * n_ctx), kv.row_size);
    return kv;
}
MOE__PRIVATE moe__cache moe__cache_take(moe__arena *arena, const moe__cache_shape *shape,
                                        moe_kv_type type, int64_t n_ctx) {
    moe__cache cache;
    cache.k = moe__kv_take(arena, type, n_ctx, shape->n_head, shape->k);
    cache.v = moe__kv_take(arena, type, n_ctx, shape->n_head, shape->v);
    return cache;
}

// ==============================================================================================
// >>batch
//
// Rows of several sequences, the buffers that they go through, and how threads share the steps
// of a forward pass (moe__forward in >>session), which every thread walks from top to bottom.
//
//   jobs       what the caller wants to be appended to which sequences
//   rows       a batch: rows[t] = {sequence, token, position}; all but mixers see rows only
//   spans      rows of one sequence that follow one another: what mixers work on
//   sequence   (moe_session) its cache, its length, its logits
//   work       (moe__work) the buffers for a batch; they belong to the pool
//
// Continuous batching and prompts are the same thing here: a batch is rows, of one sequence or of
// many, each at a position of its own. A matrix is read once for all of them, and a row's result
// has the bits it has alone, since each row's product is computed by itself, in the same order.
//
// Two ways of sharing the same steps:
//   one row      what is tiny (norms, quantizing, choosing experts) every thread does for itself
//                into memory of its own: cheaper than a barrier
//   many rows    it is split over the rows, into shared memory, and a barrier follows
// Matrices are split by their rows in both. Which memory it is shows in moe__eval.in alone.
// ==============================================================================================

enum {
    MOE__MLA_EXPAND = 128, // inputs of so many tokens expand latent vectors to keys and values,
    MOE__MLA_KEYS = 512    // at so many positions at a time: a multiple of MOE__ATTEND_KEYS
};

// A row of a batch: one token of one sequence.
typedef struct moe__row {
    moe_session *sequence;
    int32_t token, position;
} moe__row;

// Rows of a batch that follow one another in one sequence
typedef struct moe__span {
    moe_session *sequence;
    int32_t first_row, n; // rows of the batch
    int32_t past;         // position of the first: tokens of the sequence before it
    int32_t attend_row;   // number of the first among the rows that attend in the same way
    int expand;           // MLA: keys and values are expanded; else queries absorb that
    int32_t n_logits;     // the last rows, whose logits are wanted,
    float *logits;        // here
} moe__span;

// Memory of one thread.
typedef struct moe__local {
    moe__scratch scratch;
    moe__dispatch dispatch;
    moe__acts in[MOE__INPUTS]; // of one row: what is not the same for all threads
    float *rope;               // cos and sin of one row, of all ropes
    float *router_logits;
    int32_t *experts;
    float *expert_weights;
    float shared_weight;
    uint8_t *mixing;           // private buffers of the mixer that is at work
} moe__local;

// Buffers for a batch of n rows. They belong to the pool: its sessions take turns.
typedef struct moe__work {
    moe__row *rows;        // [n]
    moe__span *spans;      // [n]
    int32_t n_spans;
    float *residual;       // [n][n_embd]
    float *branch;         // the same: what is normed before it joins the residual
    float *rope;           // [n][floats of all ropes]
    moe__acts in[MOE__INPUTS]; // of [n] rows, ROUTED: [n * n_expert_used]; mixers have their own
    float *router_logits;  // [n][n_expert]
    int32_t *experts;      // [n][n_expert_used]
    float *expert_weights;
    float *shared_weights; // [n]
    float *expert_out;     // [n_expert_used + 1][n_embd], of one token, see moe__forward_down
    int32_t *numbers;      // 0, 1, 2, ... n - 1
    float *scales;         // n times the residual's scale
    uint8_t *mixing;       // shared buffers of the mixer that is at work
    moe__local *locals;    // one per thread
} moe__work;

struct moe_session {
    moe_allocator allocator;
    const moe_model *model;
    const moe__kernels *kernels;
    const moe__schedule_info *schedule;
    moe_pool *pool, *own_pool;
    int32_t pin;           // of own_pool
    moe_session_info info;
    int (*should_stop)(void *user);
    void *should_stop_user;
    int keep_all_logits;
    int32_t length;        // tokens in the cache
    int32_t n_last;        // tokens of the last eval that have logits; 0: there are none
    int in_jobs;           // while it is being evaluated
    uint64_t *expert_counts; // [layer][expert]
    double *wait_seconds;  // of each thread in the last eval
    moe_session_stats stats; // of it
    moe__cache *caches;    // per layer
    float *logits;         // [n_vocab], or [n_ctx][n_vocab] by position
    void *memory;
    uint8_t *buffers;      // within memory, at a huge page: all of the above but the logits
    size_t n_bytes;        // of buffers
    moe__work work;        // as it lies in the pool's memory
};

MOE__INLINE float *moe__take_floats(moe__arena *arena, int64_t rows, int64_t n) {
    uint64_t count;
    if (!moe__size_mul((uint64_t)rows, (uint64_t)n, &count)) count = UINT64_MAX;
    return (float *)moe__arena_take(arena, count, sizeof(float));
}

// ---- batches --------------------------------------------------------------------------------

// What is evaluated, and the batch of rows that is being evaluated
typedef struct moe__batch {
    moe_job *jobs;
    int32_t n_jobs;
    moe_session *lead;  // whose options count: its kernels, schedule, n_batch and threads
    moe__work *work;
    int32_t job, done;  // the next token: of which job, after how many of it
    int64_t n;          // rows of this batch
    int more;           // whether another follows
    int stop;           // set by thread 0 before a barrier, read after it
    moe__nodes nodes;   // of the threads
} moe__batch;

// The next rows, as many as fit, in the order of the jobs
MOE__PRIVATE void moe__batch_fill(moe__batch *batch) {
    moe__work *work = batch->work;
    const moe_model *model = batch->lead->model;
    const int32_t most = batch->lead->info.n_batch;
    const int mla = model->widest[MOE__IN_LATENT] > 0; // some layer attends to latent vectors
    int32_t absorbed = 0;
    batch->n = 0;
    work->n_spans = 0;
    for (; batch->job < batch->n_jobs && batch->n < most; batch->job++, batch->done = 0) {
        const moe_job *job = &batch->jobs[batch->job];
        moe_session *sequence = job->session;
        if (job->status) continue;
        moe__span *span = &work->spans[work->n_spans];
        span->expand = mla && job->n_tokens >= MOE__MLA_EXPAND && most >= MOE__MLA_EXPAND;
        const int absorbs = mla && !span->expand;
        int32_t n = (int32_t)moe__min(job->n_tokens - batch->done, most - batch->n);
        if (absorbs) n = (int32_t)moe__min(n, MOE__MLA_EXPAND - absorbed);
        if (n == 0) return;
        work->n_spans++;
        span->sequence = sequence;
        span->first_row = (int32_t)batch->n;
        span->n = n;
        span->past = sequence->length + batch->done;
        span->attend_row = absorbs ? absorbed : span->first_row;
        absorbed += absorbs ? n : 0;
        for (int32_t i = 0; i < n; i++, batch->n++) {
            moe__row *row = &work->rows[batch->n];
            row->sequence = sequence;
            row->token = job->tokens[batch->done + i];
            row->position = span->past + i;
            work->numbers[batch->n] = (int32_t)batch->n;
            work->scales[batch->n] = model->residual_scale;
        }
        batch->done += n;
        const int ends = batch->done == job->n_tokens;
        span->n_logits = sequence->keep_all_logits ? n : ends;
        span->logits = sequence->logits;
        if (sequence->keep_all_logits)
            span->logits += (int64_t)span->past * model->info.n_vocab;
        if (!ends) return;
    }
}

MOE__PRIVATE void moe__batch_next(moe__batch *batch) {
    moe__batch_fill(batch);
    batch->more = 0;
    for (int32_t i = batch->job; i < batch->n_jobs; i++)
        if (!batch->jobs[i].status && (i > batch->job || batch->done < batch->jobs[i].n_tokens))
            batch->more = 1;
}

// ---- the state of one thread in one batch ---------------------------------------------------

typedef struct moe__eval {
    moe__batch *batch;
    moe__work *work;
    const moe_model *model;
    const moe__kernels *kernels;
    moe__local *local;
    moe__acts in[MOE__INPUTS]; // what matrices read: of one row this thread's own, as far as
                               // every thread makes it for itself
    int thread, n_threads;
    int64_t n;       // rows of this batch
} moe__eval;

// Rows of a matrix begin at multiples of this in all threads. Half a tile costs a little more
// than half of one, but large teams would wait for whole ones.
MOE__INLINE int64_t moe__eval_row_unit(const moe__matrix *matrix, int64_t n_tokens) {
    const int64_t unit = n_tokens == 1 ? MOE__ROW_UNIT : MOE__TILE_ROWS / 2;
    return matrix->data ? moe__max(unit, (int64_t)matrix->type->rows) : unit;
}

MOE__PRIVATE void moe__eval_barrier(moe__eval *e) {
    if (e->thread == 0) e->batch->lead->stats.n_barriers++;
    moe__pool_barrier(e->batch->lead->pool, e->thread);
}

// This thread's part of `total`.
MOE__INLINE void moe__eval_range(const moe__eval *e, int64_t total, int64_t unit, int64_t *begin,
                                 int64_t *end) {
    moe__pool_range(total, unit, e->thread, e->n_threads, begin, end);
}

// Fetches the first of this thread's rows of a matrix that is read soon, see moe__matrix_fetch.
MOE__PRIVATE void moe__eval_fetch(const moe__eval *e, const moe__matrix *matrix) {
    int64_t begin, end;
    if (!matrix->data) return;
    moe__eval_range(e, matrix->n_out, moe__eval_row_unit(matrix, e->n), &begin, &end);
    moe__matrix_fetch(matrix, 0, begin, end);
}

// Matrices whose products are made between two barriers, one of a list
typedef struct moe__projection {
    const moe__matrix *matrix;
    float *out; // [row][n_out]
} moe__projection;

// This thread's rows of number i of a list: the blocks of rows of all matrices are laid out in a
// line, as long as they cost (one row: bytes, many: multiplications), those of each memory node
// by themselves, and cut into equal parts; a block belongs to the part that its middle lies in.
MOE__PRIVATE void moe__eval_cut(const moe__eval *e, const moe__projection *list, int n_list, int i,
                                int64_t *begin, int64_t *end) {
    const moe__nodes *nodes = &e->batch->nodes;
    const int32_t k = moe__nodes_of(nodes, e->thread);
    const int64_t first = nodes->first[k], last = nodes->first[k + 1];
    int64_t total = 0, before = 0, from = 0, n_units = 0, unit = 1, size = 1;
    for (int j = 0; j < n_list; j++) {
        const moe__matrix *matrix = list[j].matrix;
        const int64_t rows = moe__eval_row_unit(matrix, e->n);
        const int64_t cost = e->n == 1 ? (int64_t)matrix->row_size : matrix->n_in;
        const int64_t units = (matrix->n_out + rows - 1) / rows;
        const int64_t low = units * first / e->n_threads, high = units * last / e->n_threads;
        if (j < i) before += (high - low) * rows * cost;
        if (j == i) from = low, n_units = high - low, unit = rows, size = rows * cost;
        total += (high - low) * rows * cost;
    }
    const int64_t mine = e->thread - first, n = last - first, middle = size / 2 - before;
    const int64_t low = moe__max(total * mine / n + middle, 0) / size;
    const int64_t high = moe__max(total * (mine + 1) / n + middle, 0) / size;
    *begin = moe__min((from + moe__min(low, n_units)) * unit, list[i].matrix->n_out);
    *end = moe__min((from + moe__min(high, n_units)) * unit, list[i].matrix->n_out);
}

// out[row][all rows of matrix] = matrix x for this thread's parts of a list; no barrier.
MOE__PRIVATE void moe__eval_project(moe__eval *e, const moe__projection *list, int n_list) {
    int64_t begin, end, next = 0, next_end = 0;
    moe__eval_cut(e, list, n_list, 0, &begin, &end);
    for (int i = 0; i < n_list; i++) {
        const moe__matrix *matrix = list[i].matrix;
        if (i + 1 < n_list) {
            moe__eval_cut(e, list, n_list, i + 1, &next, &next_end);
            moe__matrix_fetch(list[i + 1].matrix, 0, next, next_end);
        }
        if (begin < end) {
            moe__acts_gather(e->in, matrix, NULL, 0, e->n, e->local->scratch.x);
            moe__matmul(e->kernels, matrix, 0, begin, end, e->local->scratch.x, e->n,
                        list[i].out + begin, matrix->n_out, e->local->scratch.pack);
        }
        begin = next, end = next_end;
    }
}

// sum += scale of the residual * matrix x for this thread's rows; no barrier.
MOE__PRIVATE void moe__eval_project_add(moe__eval *e, const moe__matrix *matrix, float *sum) {
    int64_t begin, end;
    moe__eval_range(e, matrix->n_out, moe__eval_row_unit(matrix, e->n), &begin, &end);
    moe__acts_gather(e->in, matrix, NULL, 0, e->n, e->local->scratch.x);
    if (begin < end)
        moe__matmul_add(e->kernels, matrix, 0, begin, end, e->local->scratch.x, e->n, NULL,
                        e->work->scales, sum, e->local->scratch.up, e->local->scratch.pack);
}

// norm(source) * weight, ready for matrices: one row for this thread alone, many shared.
// source: [n][values of the input].
MOE__PRIVATE void moe__eval_norm(moe__eval *e, const float *source, const float *weight,
                                 moe__input input) {
    const moe__acts *out = &e->in[input];
    int64_t begin = 0, end = 1;
    if (e->n > 1) moe__eval_range(e, e->n, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++)
        e->kernels->rms_norm(source + t * out->n, weight, out->n, e->model->eps,
                             moe__acts_f32(out, t));
    moe__acts_quantize(e->kernels, out, begin, end);
    if (e->n > 1) moe__eval_barrier(e);
}

// Floats that all threads wrote together, ready for matrices; rows of them. The barrier that
// many rows need is the caller's.
MOE__PRIVATE void moe__eval_quantize(moe__eval *e, moe__input input, int64_t rows) {
    int64_t begin = 0, end = rows;
    if (e->n > 1) moe__eval_range(e, rows, 1, &begin, &end);
    moe__acts_quantize(e->kernels, &e->in[input], begin, end);
}

// The input of this matrix, which is as wide as the layer makes it
MOE__INLINE void moe__eval_fit(moe__eval *e, const moe__matrix *matrix) {
    if (matrix->data) moe__acts_fit(&e->in[matrix->input], matrix->n_in);
}

// Applies rope to a head of row t, if the layer has one.
MOE__INLINE void moe__eval_turn(const moe__eval *e, const moe__layer *layer, int64_t t, float *x) {
    if (!layer->rope) return;
    const float *tables = e->n == 1 ? e->local->rope : e->work->rope + t * e->model->n_rope;
    moe__rope_apply(layer->rope, tables + layer->rope->table_at, x);
}

// ---- memory of mixers -----------------------------------------------------------------------

// A mixer lays out its buffers anew in each layer, in memory that all layers share: twice, once
// by itself to find out how much (without bases). Inputs of its matrices go to `in`.
typedef struct moe__memory {
    const moe_session *session; // for n_batch and n_ctx
    moe__arena common, own;     // of the team, of this thread
    moe__acts *in;
    int one_row;
} moe__memory;

MOE__INLINE moe__memory moe__eval_memory(moe__eval *e) {
    moe__memory memory;
    memset(&memory, 0, sizeof memory);
    memory.session = e->batch->lead;
    memory.common.base = e->work->mixing;
    memory.own.base = e->local->mixing;
    memory.in = e->in;
    memory.one_row = e->n == 1;
    return memory;
}

// Vectors that moe__eval_norm makes: of one row each thread's own. Returns where all threads put
// what it is to norm: many rows are normed in place.
MOE__PRIVATE float *moe__memory_take_normed(moe__memory *memory, moe__input input, int64_t n) {
    const unsigned kinds = memory->session->model->kinds[input] | MOE__ACTS_FLOATS;
    moe__acts common, own;
    moe__acts_take(&common, &memory->common, memory->session->info.n_batch, n, kinds);
    moe__acts_take(&own, &memory->own, 1, n, kinds);
    memory->in[input] = memory->one_row ? own : common;
    return (float *)(void *)common.data[MOE__ACT_F32];
}

// ==============================================================================================
// >>mixers
//
// How a layer mixes tokens: from the normed residual (MOE__IN_NORMED) to what attn_output reads
// (MOE__IN_MIXED). The formulas are on the first page of >>session. A mixer is a row of moe__mixers
// at the end of this room; it is chosen layer by layer, and nothing outside of this room knows what
// it does. It sees spans, the rows of a batch that belong to one sequence, and that sequence's
// cache; all other parts of the forward pass see rows only.
// ==============================================================================================

typedef struct moe__mixer {
    const char *name;
    // Binds its tensors. Every matrix is bound with the vector that it reads, so that this exists
    // in the right form. Sets layer->o, and layer->prefetch: the matrix that forward reads first.
    void (*bind)(moe__loader *loader, moe__layer *layer, int il);
    // What it keeps per position and sequence.
    moe__cache_shape (*cache)(const moe__layer *layer);
    // Takes its buffers, of all threads and of one, for one layer.
    void (*layout)(const moe__layer *layer, moe__memory *memory);
    // Rows in, results in MOE__IN_MIXED, a barrier behind. Called by all threads.
    void (*forward)(moe__eval *e, const moe__layer *layer, int il);
    // The greatest length, not above `length`, to which a sequence can go back.
    int32_t (*rewind)(const moe_session *session, int il, int32_t length);
} moe__mixer;

// What is kept by position can be forgotten from anywhere on.
MOE__PRIVATE int32_t moe__mixer_rewind_positions(const moe_session *session, int il,
                                                 int32_t length) {
    return (void)session, (void)il, length;
}

// ---- attention over caches ------------------------------------------------------------------

// A query sees the keys of its sequence up to its own position, or the last `window` of them. An
// item of queries begins at the chunk in which the window of its first query begins
// (moe__attention_chunk): chunks before are not read. Within what is read each query has a first
// key (moe__attend_args.first); a chunk that lies before it leaves the query as it was.
//
// Softmax without all scores at once (Milakov and Gimelshein, 2018; Dao et al., 2022): of the keys
// seen so far one keeps the largest score M, the sum S of exp(score - M) and the weighted values O.
// Two such states join: with M = max(M1, M2), S = S1 exp(M1 - M) + S2 exp(M2 - M), and O likewise.
// O / S is the result. That is what lets threads share the keys of one query.
//
// Its result has the same bits however the work is cut: keys are seen in chunks that begin at
// multiples of MOE__ATTEND_KEYS, each from a state of its own, and these are joined in their
// order (moe__attend_args).
//
// A work item is a block of queries that share a key-value head, over all chunks. Few queries
// see all of them in one call of the kernel; of many, each call's see MOE__ATTEND_CALL keys, so
// that these stay in the cache for all queries. If that makes fewer items than threads, each
// chunk becomes an item (its results are kept apart and added up behind a barrier), and then
// blocks become smaller.

enum {
    MOE__ATTEND_BLOCK = 256,              // most queries of a work item
    MOE__ATTEND_CALL = MOE__MLA_KEYS
};

// Buffers of a thread, and results of single chunks, which are shared. The latter are what makes
// a long context cost memory beside its cache: per chunk of 128 positions and head one result.
typedef struct moe__attending {
    float *q;                 // the queries of a call, side by side: those of several heads lie
                              // apart by powers of 2, in the same sets of the processor's cache
    float **out;              // where their results go, what they see,
    int32_t *first, *n_visible;
    float *max, *sum;         // and of all queries of an item the states
    float *scores;            // MOE__ATTEND_QUERIES * MOE__ATTEND_KEYS
    int64_t max_parts;        // as many chunks as the context has
    float *part_max, *part_sum, *part_out; // [max_parts][n_head], [max_parts][n_head][dv]
} moe__attending;

MOE__PRIVATE void moe__attending_take(moe__attending *w, moe__memory *memory, int64_t n_head,
                                      int64_t dk, int64_t dv) {
    const moe_session_info *info = &memory->session->info;
    const int64_t queries = moe__max(info->n_batch, MOE__ATTEND_BLOCK);
    moe__arena *own = &memory->own, *common = &memory->common;
    w->q = moe__take_floats(own, MOE__ATTEND_QUERIES, dk);
    w->out = (float **)moe__arena_take(own, MOE__ATTEND_QUERIES, sizeof(float *));
    w->first = (int32_t *)moe__arena_take(own, MOE__ATTEND_QUERIES, sizeof(int32_t));
    w->n_visible = (int32_t *)moe__arena_take(own, MOE__ATTEND_QUERIES, sizeof(int32_t));
    w->max = moe__take_floats(own, 1, queries);
    w->sum = moe__take_floats(own, 1, queries);
    w->scores = moe__take_floats(own, MOE__ATTEND_QUERIES, MOE__ATTEND_KEYS);
    w->max_parts = ((int64_t)info->n_ctx + MOE__ATTEND_KEYS - 1) / MOE__ATTEND_KEYS;
    w->part_max = moe__take_floats(common, w->max_parts, n_head);
    w->part_sum = moe__take_floats(common, w->max_parts, n_head);
    w->part_out = moe__take_floats(common, w->max_parts, n_head * dv);
}

// Attention in one layer: what its items have in common, whichever mixer asks for it. Query head h
// reads key-value head h / group: grouped queries share keys, of latent attention all heads do.
typedef struct moe__attention {
    const moe__layer *layer;
    int il;
    const moe__attending *w;
    int expand;            // 1: of spans whose keys and values are expanded (latent attention,
                           // long inputs); 0: of all others
    int64_t n_kv, group;   // key-value heads, and query heads of each
    int64_t dk, dv;
    const float *q;        // [row][n_kv * group][dk]; NULL: moe__gqa_query makes them,
    const struct moe__gqa *gqa; // from these, and keys; else NULL
    struct moe__mla *mla;      // values are the beginning of keys, or expanded from it; NULL
    float *out;            // [row][n_kv * group][dv]; rows are counted as moe__span.attend_row does
    float *max, *sum;      // of each query over the chunks so far: of an item's queries, or, if
    int carry;             // an item is one of several, [n_kv][row] (only if group is 1)
    int store;             // the item of the last chunk stores the new key and value first
    int64_t block;         // most queries of an item
    int64_t n_parts;       // most chunks of a row, if they are items; else 0
} moe__attention;

// The first key that a query at this position sees. It sees itself, so that a window of 1 leaves
// one key.
MOE__INLINE int64_t moe__attention_first(const moe__layer *layer, int64_t position) {
    return layer->window ? moe__max(0, position + 1 - layer->window) : 0;
}
// The first chunk that it sees, and how many.
MOE__INLINE int64_t moe__attention_chunk(const moe__layer *layer, int64_t position) {
    return moe__attention_first(layer, position) / MOE__ATTEND_KEYS;
}
MOE__INLINE int64_t moe__attention_chunks(const moe__layer *layer, int64_t position) {
    return position / MOE__ATTEND_KEYS + 1 - moe__attention_chunk(layer, position);
}

// Whether so many items keep the threads busy. Of a prompt's, those of later queries cost more:
// they come out even if each thread has some. Of other inputs, all cost the same: with n threads
// and n + 1 items half of the time nearly all threads would wait, so that rounds of items must be
// filled to 14/16 at least.
MOE__PRIVATE int moe__attention_is_even(const moe__eval *e, const moe__attention *at,
                                        int64_t items) {
    const int64_t n = e->n_threads, each = (items + n - 1) / n;
    if (at->expand) return items >= n;
    if (e->n > 1) return items >= 4 * n;
    return items >= n && (at->block <= 16 || 16 * items >= 14 * each * n);
}

// How work is cut: sets block and n_parts. Nothing of it changes results. Large blocks are
// cheapest, each chunk of keys being read once for all their queries; the search begins there and
// makes more items until the threads are busy, first by chunks, then by smaller blocks.
MOE__PRIVATE void moe__attention_plan(const moe__eval *e, moe__attention *at) {
    int64_t most = 0, rows = 0, items = 0;
    const int64_t least = at->expand ? MOE__MLA_EXPAND : 4;
    const int64_t limit = at->expand ? 0 : at->w->max_parts; // expanding is not done twice
    at->block = MOE__ATTEND_BLOCK;
    if (at->expand) at->block = moe__max(at->block, e->n);
    at->n_parts = 0;
    for (;;) {
        items = rows = 0;
        for (int32_t i = 0; i < e->work->n_spans; i++) {
            const moe__span *span = &e->work->spans[i];
            if (span->expand != at->expand) continue;
            items += (span->n * at->group + at->block - 1) / at->block * at->n_kv;
            rows += span->n;
            most = moe__max(most, moe__attention_chunks(at->layer, span->past + span->n - 1));
        }
        if (moe__attention_is_even(e, at, items * moe__max(at->n_parts, 1)) || at->block <= least)
            break;
        if (!at->n_parts && most > 1 && rows * most <= limit)
            at->n_parts = most;
        else
            at->block /= 2;
    }
    // A few items that cannot be dealt out evenly
    if (!at->n_parts && items % e->n_threads && items < 8 * e->n_threads && most > 1 &&
        rows * most <= limit)
        at->n_parts = most;
}

typedef struct moe__item {
    const moe__span *span;
    int64_t head;             // key-value head
    int64_t begin, end;       // queries of the span: i is head i % group of row i / group
    int64_t chunk, chunk_end;
} moe__item;

// Where a thread is in the list of items, which is computed and not stored
typedef struct moe__items {
    int32_t span;
    int64_t part, pair; // chunk, (block, head)
    int64_t number;
} moe__items;

// Items are dealt out to the threads forth and back (0 1 2 3, 3 2 1 0, ...): where they grow from
// one to the next, as those of a prompt's queries do, all threads get as much.
MOE__INLINE int moe__items_turn(const moe__eval *e, int64_t number) {
    const int64_t turn = number / e->n_threads, i = number % e->n_threads;
    return (turn % 2 ? e->n_threads - 1 - i : i) == e->thread;
}

// The next item of this thread; 0: there is none. The last queries of a span see most keys: they
// come first, so that what is left at the end is small. Of chunks the last comes last, which may be
// short, down to one key.
MOE__PRIVATE int moe__items_next(const moe__eval *e, const moe__attention *at, moe__items *it,
                                 moe__item *item) {
    for (; it->span < e->work->n_spans; it->span++, it->part = 0) {
        const moe__span *span = &e->work->spans[it->span];
        const int64_t queries = span->n * at->group;
        const int64_t blocks = (queries + at->block - 1) / at->block;
        if (span->expand != at->expand) continue;
        for (; it->part < moe__max(at->n_parts, 1); it->part++, it->pair = 0)
            while (it->pair < blocks * at->n_kv) {
                const int64_t pair = it->pair++;
                item->span = span;
                item->head = pair % at->n_kv;
                item->begin = (blocks - 1 - pair / at->n_kv) * at->block;
                item->end = moe__min(queries, item->begin + at->block);
                const int64_t last = span->past + (item->end - 1) / at->group;
                item->chunk = it->part +
                              moe__attention_chunk(at->layer, span->past + item->begin / at->group);
                item->chunk_end = last / MOE__ATTEND_KEYS + 1;
                if (item->chunk >= item->chunk_end) continue;
                if (at->n_parts) item->chunk_end = item->chunk + 1;
                if (moe__items_turn(e, it->number++)) return 1;
            }
    }
    return 0;
}

// The number of one chunk's result for a row (as moe__span.attend_row counts) and query head
MOE__INLINE int64_t moe__attention_part(const moe__attention *at, int64_t row, int64_t head,
                                        int64_t part) {
    return (row * at->n_parts + part) * at->n_kv * at->group + head;
}

// The state before the first key. A sink is as good as a key that was seen before all others,
// whose value is 0.
MOE__PRIVATE void moe__attention_begin(const moe__attention *at, int64_t head, float *max,
                                       float *sum, float *out) {
    *max = at->layer->sinks ? at->layer->sinks[head] : -INFINITY;
    *sum = at->layer->sinks ? 1.0f : 0.0f;
    memset(out, 0, (size_t)at->dv * sizeof *out);
}

// The results of a row's chunks, which are kept apart, into `out`: joined in their order, from the
// state before the first key on, by the arithmetic with which the kernel joins them in one call.
MOE__PRIVATE void moe__attention_merge(const moe__eval *e, const moe__attention *at,
                                       const moe__span *span, int64_t i, int64_t head) {
    const int64_t n_head = at->n_kv * at->group, row = span->attend_row + i;
    const int64_t n = moe__attention_chunks(at->layer, span->past + i);
    float max, sum, *out = at->out + (row * n_head + head) * at->dv;
    moe__attention_begin(at, head, &max, &sum, out);
    for (int64_t c = 0; c < n; c++) {
        const int64_t part = moe__attention_part(at, row, head, c);
        e->kernels->attend_add(at->w->part_max[part], at->w->part_sum[part],
                               at->w->part_out + part * at->dv, at->dv, &max, &sum, out);
    }
    e->kernels->divide(out, at->dv, sum);
}
// All of them, shared by the threads: (row, head) pairs of all spans laid out in a line and cut.
MOE__PRIVATE void moe__attention_merge_all(const moe__eval *e, const moe__attention *at) {
    const int64_t n_head = at->n_kv * at->group;
    int64_t total = 0, begin, end;
    for (int32_t i = 0; i < e->work->n_spans; i++)
        if (e->work->spans[i].expand == at->expand) total += e->work->spans[i].n * n_head;
    moe__eval_range(e, total, 1, &begin, &end);
    for (int32_t i = 0; i < e->work->n_spans; i++) {
        const moe__span *span = &e->work->spans[i];
        if (span->expand != at->expand) continue;
        for (int64_t j = moe__max(begin, 0); j < moe__min(end, span->n * n_head); j++)
            moe__attention_merge(e, at, span, j / n_head, j % n_head);
        begin -= span->n * n_head, end -= span->n * n_head;
    }
}

// ---- grouped-query attention ----------------------------------------------------------------

// Ainslie et al., 2023: n_head queries, n_head_kv keys and values, which take n_head / n_head_kv
// times less cache. With as many of each it is multi-head attention, with one multi-query
// attention. Queries and keys are normed by head (Qwen3), over all heads (OLMoE) or not, then
// turned; the factor of the scores is put into the queries.

MOE__PRIVATE void moe__gqa_bind(moe__loader *loader, moe__layer *layer, int il) {
    const moe_model *model = loader->model;
    const int64_t n_embd = model->info.n_embd, n_q = (int64_t)layer->n_head * layer->head_k;
    const int64_t n_k = (int64_t)layer->n_head_kv * layer->head_k;
    const int64_t n_v = (int64_t)layer->n_head_kv * layer->head_v;
    const int64_t n_out = (int64_t)layer->n_head * layer->head_v;
    const moe__input x = MOE__IN_NORMED;
    moe__matrix fused;
    memset(&fused, 0, sizeof fused);
    if (moe__load_matrix(loader, &fused, il, "attn_qkv", x, n_embd, n_q + n_k + n_v, 1, 1, 0)) {
        layer->q = moe__load_slice(loader, &fused, 0, n_q);
        layer->k = moe__load_slice(loader, &fused, n_q, n_k);
        layer->v = moe__load_slice(loader, &fused, n_q + n_k, n_v);
        if (!fused.bias) { // some files fuse the weights only
            layer->q.bias = moe__load_vector(loader, il, "attn_q", "bias", n_q, 1, 0);
            layer->k.bias = moe__load_vector(loader, il, "attn_k", "bias", n_k, 1, 0);
            layer->v.bias = moe__load_vector(loader, il, "attn_v", "bias", n_v, 1, 0);
        }
    } else {
        moe__load_matrix(loader, &layer->q, il, "attn_q", x, n_embd, n_q, 1, 1, 1);
        moe__load_matrix(loader, &layer->k, il, "attn_k", x, n_embd, n_k, 1, 1, 1);
        moe__load_matrix(loader, &layer->v, il, "attn_v", x, n_embd, n_v, 1, 1, 1);
    }
    moe__load_matrix(loader, &layer->o, il, "attn_output", MOE__IN_MIXED, n_out, n_embd, 1, 1, 1);
    if (moe__has(model, MOE__GATE))
        moe__load_matrix(loader, &layer->gate, il, "attn_gate", x, n_embd, n_out, 1, 1, 1);
    layer->norm_wide = moe__has(model, MOE__QK_NORM_WIDE);
    const int normed = layer->norm_wide || moe__has(model, MOE__QK_NORM);
    layer->q_norm = moe__load_vector(loader, il, "attn_q_norm", "weight",
                                     layer->norm_wide ? n_q : layer->head_k, 1, normed);
    layer->k_norm = moe__load_vector(loader, il, "attn_k_norm", "weight",
                                     layer->norm_wide ? n_k : layer->head_k, 1, normed);
    if (moe__has(model, MOE__SINKS))
        layer->sinks = moe__load_vector(loader, il, "attn_sinks", "weight", layer->n_head, 1, 1);
    layer->prefetch = &layer->q;
}

MOE__PRIVATE moe__cache_shape moe__gqa_cache(const moe__layer *layer) {
    const moe__cache_shape shape = {layer->n_head_kv, layer->head_k, layer->head_v, 0};
    return shape;
}

// What one batch is projected to. Rows of q and k are normed and turned where they are, or, of one
// row, by each item into its own memory.
typedef struct moe__gqa {
    float *q, *k, *v;       // [row][heads * width], as projected, then normed and turned
    float *gate;            // [row][n_head * head_v]; NULL: none
    float *wide_q, *wide_k; // one row's normed over all heads, if the layer does that
    moe__attending attending;
} moe__gqa;

// Its buffers for a batch. Called twice with the same arguments, see moe__memory; what threads
// share is taken from `common`, what each has for itself from `own`.
MOE__PRIVATE void moe__gqa_take(const moe__layer *layer, moe__memory *memory, moe__gqa *w) {
    const int64_t n = memory->session->info.n_batch, dk = layer->head_k, dv = layer->head_v;
    memset(w, 0, sizeof *w);
    w->q = moe__take_floats(&memory->common, n, layer->n_head * dk);
    w->k = moe__take_floats(&memory->common, n, layer->n_head_kv * dk);
    w->v = moe__take_floats(&memory->common, n, layer->n_head_kv * dv);
    if (layer->gate.data) w->gate = moe__take_floats(&memory->common, n, layer->n_head * dv);
    if (layer->norm_wide) {
        w->wide_q = moe__take_floats(&memory->own, layer->n_head, dk);
        w->wide_k = moe__take_floats(&memory->own, layer->n_head_kv, dk);
    }
    moe__attending_take(&w->attending, memory, layer->n_head, dk, dv);
}
MOE__PRIVATE void moe__gqa_layout(const moe__layer *layer, moe__memory *memory) {
    moe__gqa w;
    moe__gqa_take(layer, memory, &w);
}

// The projected query and key of row t; where they are normed over all heads together, after
// moe__gqa_norm_wide: one row's in this thread's memory, many in place.
MOE__INLINE float *moe__gqa_q(const moe__eval *e, const moe__layer *layer, const moe__gqa *w,
                              int64_t t) {
    return e->n == 1 && w->wide_q ? w->wide_q : w->q + t * layer->n_head * layer->head_k;
}
MOE__INLINE float *moe__gqa_k(const moe__eval *e, const moe__layer *layer, const moe__gqa *w,
                              int64_t t) {
    return e->n == 1 && w->wide_k ? w->wide_k : w->k + t * layer->n_head_kv * layer->head_k;
}
MOE__PRIVATE void moe__gqa_norm_wide(const moe__eval *e, const moe__layer *layer,
                                     const moe__gqa *w, int64_t t) {
    const int64_t n_q = (int64_t)layer->n_head * layer->head_k;
    const int64_t n_k = (int64_t)layer->n_head_kv * layer->head_k;
    if (!layer->norm_wide) return;
    e->kernels->rms_norm(w->q + t * n_q, layer->q_norm, n_q, e->model->eps,
                         moe__gqa_q(e, layer, w, t));
    e->kernels->rms_norm(w->k + t * n_k, layer->k_norm, n_k, e->model->eps,
                         moe__gqa_k(e, layer, w, t));
}

MOE__PRIVATE void moe__gqa_clamp(const moe__layer *layer, float *x, int64_t n) {
    const float most = layer->clamp_kqv;
    for (int64_t i = 0; i < n && most > 0; i++) x[i] = moe__clamp(x[i], -most, most);
}

// Norms, turns and scales the query of one head; out: head_k floats, may be its place. In this
// order: norm by head, clamp, rotation, the factor of the scores.
MOE__PRIVATE void moe__gqa_query(const moe__eval *e, const moe__layer *layer, const moe__gqa *w,
                                 int64_t t, int64_t head, float *out) {
    const int64_t d = layer->head_k;
    const float *q = moe__gqa_q(e, layer, w, t) + head * d;
    if (layer->q_norm && !layer->norm_wide)
        e->kernels->rms_norm(q, layer->q_norm, d, e->model->eps, out);
    else if (out != q)
        memcpy(out, q, (size_t)d * sizeof *out);
    moe__gqa_clamp(layer, out, d);
    moe__eval_turn(e, layer, t, out);
    for (int64_t i = 0; i < d; i++) out[i] *= layer->kq_scale;
}

// Norms and turns the key of one head and stores it and its value in the cache.
MOE__PRIVATE void moe__gqa_store(const moe__eval *e, const moe__layer *layer, int il,
                                 const moe__gqa *w, int64_t t, int64_t head) {
    const moe__row *row = &e->work->rows[t];
    const int64_t d = layer->head_k, dv = layer->head_v;
    const moe__cache *cache = &row->sequence->caches[il];
    float *k = moe__gqa_k(e, layer, w, t) + head * d;
    float *v = w->v + (t * layer->n_head_kv + head) * dv;
    if (layer->k_norm && !layer->norm_wide)
        e->kernels->rms_norm(k, layer->k_norm, d, e->model->eps, k);
    moe__gqa_clamp(layer, k, d);
    moe__gqa_clamp(layer, v, dv);
    moe__eval_turn(e, layer, t, k);
    moe__kv_store(e->kernels, &cache->k, moe__kv_row(&cache->k, head, row->position), 0, k, d);
    moe__kv_store(e->kernels, &cache->v, moe__kv_row(&cache->v, head, row->position), 0, v, dv);
}

// ---- multi-head latent attention (DeepSeek-V2 report, 2.1) ----------------------------------

// The cache holds one vector per position for all heads: the latent one, from which each head's
// key and value are made by matrices of its own, K_i and V_i, and a rotated key that all share. For
// key K_i l and query q the score q . (K_i l) is (K_i^T q) . l: either side can do the work.
//
// Short inputs are absorbed: a query is multiplied with k_b (K_i^T) and then compared with the
// cached latent vectors themselves, whose weighted sum v_b makes a result of. All heads read the
// same rows: 2 x 512 multiplications per key, head and query, but hardly any memory. Long ones
// expand each chunk of the cache to the head's keys and values: 512 x (128 + 128) multiplications
// per key and head once, and then 128 + 64 + 128 per query, which is less from 200 queries on.
//
// The two round differently. Which one it is depends on the number of tokens in an input alone
// (MOE__MLA_EXPAND), never on threads or on how a batch is cut.

// The keys' rows of kv_b transposed, as attn_k_b has them: absorbing is then a product like
// others. Blocks run along rows, so that a transposed matrix has to be quantized anew. Types that
// hold a float each are kept; the others become Q8_0, which loses less than llama.cpp's own
// conversion to attn_k_b does.
MOE__PRIVATE void moe__mla_transpose(moe__loader *loader, moe__layer *layer) {
    const moe__kernels *kernels = moe__kernels_get(MOE_ISA_BEST);
    const moe__matrix *kv_b = &layer->kv_b;
    const int64_t nope = layer->head_k - layer->n_rot, kv_lora = layer->kv_lora;
    const moe_type like = kv_b->type->id;
    const moe_type type = like == MOE_TYPE_F16 || like == MOE_TYPE_BF16 ? like
                          : like == MOE_TYPE_F32 || nope % 32           ? MOE_TYPE_F32
                                                                        : MOE_TYPE_Q8_0;
    const size_t row_size = moe_type_row_size(type, nope);
    moe__matrix *k_b = &layer->k_b;
    uint8_t *rows =
        (uint8_t *)moe__load_alloc(loader, (uint64_t)(layer->n_head * kv_lora), row_size);
    float *floats = (float *)moe__alloc_unset(&loader->model->allocator,
                                              (size_t)(2 * nope * kv_lora) * sizeof *floats);
    if (!floats)
        moe__load_fail(loader, MOE_ERROR_MEMORY, "attn_kv_b", "no memory to transpose a matrix");
    for (int32_t head = 0; head < layer->n_head && !loader->status; head++) {
        float *turned = floats + nope * kv_lora;
        moe__matrix_to_f32(kernels, kv_b, head, 0, nope, floats);
        for (int64_t r = 0; r < kv_lora; r++)
            for (int64_t i = 0; i < nope; i++) turned[r * nope + i] = floats[i * kv_lora + r];
        loader->status = moe_type_quantize(type, turned, rows + (size_t)(head * kv_lora) * row_size,
                                           kv_lora, nope, NULL, loader->error);
    }
    moe__free(&loader->model->allocator, floats);
    if (loader->status) return;
    memset(k_b, 0, sizeof *k_b);
    k_b->data = rows;
    k_b->type = moe__type_find(type);
    k_b->index = (int)(k_b->type - moe__types);
    k_b->n_in = nope;
    k_b->n_out = kv_lora;
    k_b->n_expert = layer->n_head;
    k_b->row_size = row_size;
    k_b->expert_size = row_size * (size_t)kv_lora;
    moe__load_input(loader, k_b, MOE__IN_Q_NOPE);
    moe_model_info *info = &loader->model->info;
    const int64_t made = (int64_t)k_b->expert_size * layer->n_head;
    info->n_bytes_made += made;
    info->n_bytes_token += made - (int64_t)kv_b->row_size * nope * layer->n_head;
}

// kv_b, k_b or v_b, a matrix per head
MOE__PRIVATE void moe__mla_bind_heads(moe__loader *loader, const moe__layer *layer,
                                      moe__matrix *matrix, int il, const char *name,
                                      moe__input input, int64_t n_in, int64_t n_out,
                                      int required) {
    moe__load_matrix(loader, matrix, il, name, input, n_in, n_out, layer->n_head, 1, required);
    char bias[64];
    snprintf(bias, sizeof bias, "blk.%d.%s.bias", il, name);
    if (matrix->bias) // expanded rows would lose it
        moe__load_fail(loader, MOE_ERROR_UNSUPPORTED, bias,
                       "tensor %s: latent attention knows none", bias);
}

// Three generations of files: kv_b only; k_b and v_b; all three. kv_b holds, head after head, the
// rows that make the head's unrotated key and those that make its value.
MOE__PRIVATE void moe__mla_bind(moe__loader *loader, moe__layer *layer, int il) {
    const int64_t n_embd = loader->model->info.n_embd, n_head = layer->n_head;
    const int64_t kv_lora = layer->kv_lora, dv = layer->head_v, rank = layer->q_lora;
    const int64_t nope = layer->head_k - layer->n_rot, n_q = n_head * layer->head_k;
    if (rank) {
        moe__load_matrix(loader, &layer->q_a, il, "attn_q_a", MOE__IN_NORMED, n_embd, rank, 1, 1,
                         1);
        moe__load_matrix(loader, &layer->q_b, il, "attn_q_b", MOE__IN_Q_A, rank, n_q, 1, 1, 1);
        layer->q_a_norm = moe__load_vector(loader, il, "attn_q_a_norm", "weight", rank, 1, 1);
        if (layer->q_b.data) moe__load_slice(loader, &layer->q_b, 0, layer->head_k); // heads
    } else {
        moe__load_matrix(loader, &layer->q, il, "attn_q", MOE__IN_NORMED, n_embd, n_q, 1, 1, 1);
    }
    moe__load_matrix(loader, &layer->kv_a, il, "attn_kv_a_mqa", MOE__IN_NORMED, n_embd,
                     kv_lora + layer->n_rot, 1, 1, 1);
    layer->kv_a_norm = moe__load_vector(loader, il, "attn_kv_a_norm", "weight", kv_lora, 1, 1);
    moe__load_matrix(loader, &layer->o, il, "attn_output", MOE__IN_MIXED, n_head * dv, n_embd, 1,
                     1, 1);
    layer->prefetch = &layer->kv_a;
    moe__mla_bind_heads(loader, layer, &layer->k_b, il, "attn_k_b", MOE__IN_Q_NOPE, nope, kv_lora,
                        0);
    moe__mla_bind_heads(loader, layer, &layer->v_b, il, "attn_v_b", MOE__IN_LATENT, kv_lora, dv, 0);
    if (layer->k_b.data && layer->v_b.data) return;
    moe__mla_bind_heads(loader, layer, &layer->kv_b, il, "attn_kv_b", MOE__IN_NONE, kv_lora,
                        nope + dv, 1);
    if (loader->status) return;
    layer->v_b = moe__load_slice(loader, &layer->kv_b, nope, dv);
    moe__load_input(loader, &layer->v_b, MOE__IN_LATENT);
    if (!loader->status) moe__mla_transpose(loader, layer);
}

// One row per position for all heads. Its two parts are stored one behind the other, and a type of
// blocks needs both to be whole blocks.
MOE__PRIVATE moe__cache_shape moe__mla_cache(const moe__layer *layer) {
    const moe__cache_shape shape = {1, layer->kv_lora + layer->n_rot, 0, layer->kv_lora};
    return shape;
}

// What a batch is projected to, and what it takes to expand the cache: a head's matrices as floats
// and MOE__MLA_KEYS positions of keys and values, of one head in each thread or of all heads.
typedef struct moe__mla {
    float *q;          // [row][n_head * head_k]
    float *q_a;        // [row][q_lora], not yet normed
    float *kv_a;       // [row][kv_lora + n_rot]: what the cache keeps
    float *q_absorbed; // [absorbed row][n_head][kv_lora + n_rot]
    float *w_k, *w_v;  // a head's rows of kv_b as floats
    float *rows;       // a group of k_b's rows
    int64_t head;      // whose rows w_k and w_v are; -1: nobody's
    float *latent, *keys, *values; // some positions, expanded for this head,
    const void **latent_rows;
    float *all_keys, *all_values;  // or by all threads, [n_head][MOE__MLA_KEYS][width], with
    float *max, *sum;              // the queries' states, [row][n_head]; NULL: each for itself
    moe__attending attending;
} moe__mla;

// Whether heads cannot be dealt out evenly to the threads: then all expand together. Otherwise a
// thread expands the chunks of its own heads into its own memory and needs nobody for that.
MOE__INLINE int moe__mla_is_shared(const moe__layer *layer, int32_t n_threads) {
    return layer->n_head % n_threads && layer->n_head < 8 * n_threads;
}

MOE__PRIVATE void moe__mla_take(const moe__layer *layer, moe__memory *memory, moe__mla *w) {
    const moe_model *model = memory->session->model;
    const int64_t n = memory->session->info.n_batch, n_head = layer->n_head;
    const int64_t dk = layer->head_k, dv = layer->head_v, kv_lora = layer->kv_lora;
    const int64_t absorbed = moe__min(n, MOE__MLA_EXPAND), nope = dk - layer->n_rot;
    const int64_t width = kv_lora + layer->n_rot;
    moe__arena *common = &memory->common, *own = &memory->own;
    memset(w, 0, sizeof *w);
    w->head = -1;
    w->q = moe__take_floats(common, n, n_head * dk);
    w->kv_a = moe__take_floats(common, n, width);
    w->q_absorbed = moe__take_floats(common, absorbed, n_head * width);
    moe__acts_take(&memory->in[MOE__IN_LATENT], common, absorbed * n_head, kv_lora,
                   model->kinds[MOE__IN_LATENT] | MOE__ACTS_FLOATS);
    moe__acts_take(&memory->in[MOE__IN_Q_NOPE], own, absorbed, nope,
                   model->kinds[MOE__IN_Q_NOPE] | MOE__ACTS_FLOATS);
    if (layer->q_lora) w->q_a = moe__memory_take_normed(memory, MOE__IN_Q_A, layer->q_lora);
    moe__attending_take(&w->attending, memory, n_head, moe__max(dk, width), moe__max(dv, kv_lora));
    if (n < MOE__MLA_EXPAND) return;
    w->w_k = moe__take_floats(own, nope, kv_lora);
    w->w_v = moe__take_floats(own, dv, kv_lora);
    w->rows = moe__take_floats(own, MOE__GROUP_ROWS, nope);
    w->latent = moe__take_floats(own, MOE__MLA_KEYS, kv_lora);
    w->keys = moe__take_floats(own, MOE__MLA_KEYS, dk);
    w->values = moe__take_floats(own, MOE__MLA_KEYS, dv);
    w->latent_rows = (const void **)moe__arena_take(own, MOE__MLA_KEYS, sizeof(void *));
    if (!moe__mla_is_shared(layer, memory->session->info.n_threads_batch)) return;
    w->all_keys = moe__take_floats(common, n_head * MOE__MLA_KEYS, dk);
    w->all_values = moe__take_floats(common, n_head * MOE__MLA_KEYS, dv);
    w->max = moe__take_floats(common, n, n_head);
    w->sum = moe__take_floats(common, n, n_head);
}
MOE__PRIVATE void moe__mla_layout(const moe__layer *layer, moe__memory *memory) {
    moe__mla w;
    moe__mla_take(layer, memory, &w);
}

// Norms the latent vector, turns the shared key, stores both in the cache. What is cached is
// normed and turned, so that nothing is left to do when it is read.
MOE__PRIVATE void moe__mla_store(const moe__eval *e, const moe__layer *layer, int il,
                                 const moe__mla *w, int64_t t) {
    const moe__row *at = &e->work->rows[t];
    const moe__kv *cache = &at->sequence->caches[il].k;
    const int64_t kv_lora = layer->kv_lora;
    float *row = w->kv_a + t * cache->width;
    uint8_t *out = moe__kv_row(cache, 0, at->position);
    e->kernels->rms_norm(row, layer->kv_a_norm, kv_lora, e->model->eps, row);
    moe__eval_turn(e, layer, t, row + kv_lora);
    moe__kv_store(e->kernels, cache, out, 0, row, cache->width);
}

// Rows of kv_b that make a head's unrotated keys, as floats, w_k[i][kv_lora]: from kv_b, or turned
// back from k_b.
MOE__PRIVATE void moe__mla_key_rows(const moe__eval *e, const moe__layer *layer,
                                    const moe__mla *w, int64_t head) {
    const int64_t nope = layer->head_k - layer->n_rot, kv_lora = layer->kv_lora;
    if (layer->kv_b.data) {
        moe__matrix_to_f32(e->kernels, &layer->kv_b, (int32_t)head, 0, nope, w->w_k);
        return;
    }
    const int64_t group = layer->k_b.type->rows;
    for (int64_t r = 0; r < kv_lora; r += group) { // k_b is stored transposed: {nope, latent}
        moe__matrix_to_f32(e->kernels, &layer->k_b, (int32_t)head, r, group, w->rows);
        for (int64_t k = 0; k < group; k++)
            for (int64_t i = 0; i < nope; i++) w->w_k[i * kv_lora + r + k] = w->rows[k * nope + i];
    }
}

// Turns and scales the rotated part of a query; scales the other. The factor of the scores goes
// into the query, once, and not into each score.
MOE__PRIVATE void moe__mla_turn(const moe__eval *e, const moe__layer *layer, int64_t t,
                                const float *q, float *nope_out, float *turned) {
    const int64_t nope = layer->head_k - layer->n_rot;
    float scale = layer->kq_scale;
    if (layer->temperature > 0)
        scale *= (float)(1 + layer->temperature *
                                 log(e->work->rows[t].position / layer->temperature_length + 1.0));
    if (turned != q + nope) memcpy(turned, q + nope, (size_t)layer->n_rot * sizeof *turned);
    for (int64_t i = 0; i < nope; i++) nope_out[i] = q[i] * scale;
    moe__eval_turn(e, layer, t, turned);
    for (int64_t i = 0; i < layer->n_rot; i++) turned[i] *= scale;
}

// Absorbed queries of one head: [k_b q_nope | rope(q_rot)], scaled, of all rows that absorb.
MOE__PRIVATE void moe__mla_absorb(moe__eval *e, const moe__layer *layer, const moe__mla *w,
                                  int64_t head) {
    const moe__acts *q_nope = &e->in[MOE__IN_Q_NOPE];
    const int64_t kv_lora = layer->kv_lora, width = kv_lora + layer->n_rot, n_head = layer->n_head;
    float *out = w->q_absorbed + head * width;
    int64_t n = 0;
    for (int32_t s = 0; s < e->work->n_spans; s++) {
        const moe__span *span = &e->work->spans[s];
        for (int64_t i = 0; i < span->n && !span->expand; i++, n++)
            moe__mla_turn(e, layer, span->first_row + i,
                          w->q + ((span->first_row + i) * n_head + head) * layer->head_k,
                          moe__acts_f32(q_nope, n), out + n * n_head * width + kv_lora);
    }
    if (n == 0) return;
    moe__acts_quantize(e->kernels, q_nope, 0, n);
    moe__acts_gather(e->in, &layer->k_b, NULL, 0, n, e->local->scratch.x);
    moe__matmul(e->kernels, &layer->k_b, (int32_t)head, 0, kv_lora, e->local->scratch.x, n, out,
                n_head * width, e->local->scratch.pack);
}

// A head's rows of k_b and v_b as floats, for moe__mla_expand: kept while the head stays the same,
// since its chunks follow one another.
MOE__PRIVATE void moe__mla_head(const moe__eval *e, const moe__layer *layer, moe__mla *w,
                                int64_t head) {
    if (w->head == head) return;
    w->head = head;
    moe__mla_key_rows(e, layer, w, head);
    moe__matrix_to_f32(e->kernels, &layer->v_b, (int32_t)head, 0, layer->head_v, w->w_v);
}

// out[key][0 .. n - 1] = n rows of weights . latent vectors of keys
MOE__PRIVATE void moe__mla_expand_rows(const moe__eval *e, const moe__mla *w, int64_t kv_lora,
                                       const float *rows, int64_t n, int64_t n_keys, float *out,
                                       int64_t stride) {
    moe__tile_fn *tile = e->kernels->type[MOE__INDEX_F32].tile;
    for (int64_t i = 0; i < n; i += MOE__TILE_ROWS)
        tile((const uint8_t *)(rows + i * kv_lora), (size_t)kv_lora * sizeof(float),
             moe__min(n - i, MOE__TILE_ROWS), kv_lora, w->latent_rows, n_keys, out + i, stride,
             e->local->scratch.pack, NULL, 0);
}

// Keys and values of one head at positions begin .. begin + n_keys - 1, as floats: its rows of kv_b
// times the latent vectors, a matrix product of the F32 kind, and behind each key the part that
// all heads share.
MOE__PRIVATE void moe__mla_expand(const moe__eval *e, const moe__layer *layer, const moe__mla *w,
                                  const moe__kv *cache, int64_t begin, int64_t n_keys,
                                  float *keys, float *values) {
    const int64_t kv_lora = layer->kv_lora, dk = layer->head_k, nope = dk - layer->n_rot;
    const int type = cache->type == MOE_KV_F32   ? MOE__INDEX_F32
                     : cache->type == MOE_KV_F16 ? MOE__INDEX_F16
                                                 : MOE__INDEX_Q8_0;
    const size_t turned = moe__kv_bytes(cache->type, kv_lora);
    for (int64_t j = 0; j < n_keys; j++) {
        const uint8_t *row = moe__kv_row(cache, 0, begin + j);
        e->kernels->type[type].dequantize(row, kv_lora, w->latent + j * kv_lora);
        e->kernels->type[type].dequantize(row + turned, layer->n_rot, keys + j * dk + nope);
        w->latent_rows[j] = w->latent + j * kv_lora;
    }
    moe__mla_expand_rows(e, w, kv_lora, w->w_k, nope, n_keys, keys, dk);
    moe__mla_expand_rows(e, w, kv_lora, w->w_v, layer->head_v, n_keys, values, layer->head_v);
}

// This thread's part of n_keys positions from `key` on, expanded for all heads: heads times blocks
// of positions, in a line, so that a thread has few heads whose matrices it must unpack
MOE__PRIVATE void moe__mla_expand_share(const moe__eval *e, const moe__layer *layer, moe__mla *w,
                                        const moe__kv *cache, int64_t key, int64_t n_keys) {
    enum { BLOCK = 64 };
    const int64_t dk = layer->head_k, dv = layer->head_v, blocks = (n_keys + BLOCK - 1) / BLOCK;
    int64_t begin, end;
    moe__eval_range(e, layer->n_head * blocks, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / blocks, first = i % blocks * BLOCK;
        moe__mla_head(e, layer, w, head);
        moe__mla_expand(e, layer, w, cache, key + first, moe__min(n_keys - first, BLOCK),
                        w->all_keys + (head * MOE__MLA_KEYS + first) * dk,
                        w->all_values + (head * MOE__MLA_KEYS + first) * dv);
    }
}

// ---- work items of attention ----------------------------------------------------------------

// The number of query i of an item among those of all rows and heads: its place in out
MOE__INLINE int64_t moe__attention_query(const moe__attention *at, const moe__item *item,
                                         int64_t i) {
    return ((item->span->attend_row + i / at->group) * at->n_kv + item->head) * at->group +
           i % at->group;
}
// Where its state is kept.
MOE__INLINE int64_t moe__attention_state(const moe__eval *e, const moe__attention *at,
                                         const moe__item *item, int64_t i) {
    return at->carry ? item->head * e->n + item->span->attend_row + i : i - item->begin;
}
// Which part an item of one chunk makes of query i.
MOE__INLINE int64_t moe__attention_part_of(const moe__attention *at, const moe__item *item,
                                           int64_t i) {
    const int64_t t = i / at->group, chunk = moe__attention_chunk(at->layer, item->span->past + t);
    return moe__attention_part(at, item->span->attend_row + t,
                               item->head * at->group + i % at->group, item->chunk - chunk);
}

// The queries of a call, from number `first` of the span on, side by side for the kernel: copied,
// or made here of what was projected (one row: each item makes its own).
MOE__PRIVATE void moe__attention_gather(const moe__eval *e, const moe__attention *at,
                                        const moe__item *item, int64_t first, int32_t n) {
    for (int64_t i = first; i < first + n; i++) {
        float *q = at->w->q + (i - first) * at->dk;
        if (at->q)
            memcpy(q, at->q + moe__attention_query(at, item, i) * at->dk,
                   (size_t)at->dk * sizeof *q);
        else
            moe__gqa_query(e, at->layer, at->gqa, item->span->first_row + i / at->group,
                           item->head * at->group + i % at->group, q);
    }
}

// At most MOE__ATTEND_QUERIES queries, from number `first` of the span on; a: the keys from
// position `key` on. Says for each query which of these keys it sees, where its state is and where
// its result goes: to its place among all results, where states of later calls join it, or, if
// items are single chunks, to the chunk's own place with a state that begins anew.
MOE__PRIVATE void moe__attention_call(const moe__eval *e, const moe__attention *at,
                                      const moe__item *item, int64_t first, int64_t key,
                                      moe__attend_args *a) {
    const moe__attending *w = at->w;
    const int64_t state = moe__attention_state(e, at, item, first);
    int any = 0;
    a->n_queries = (int32_t)moe__min(item->end - first, MOE__ATTEND_QUERIES);
    a->max = at->max + state, a->sum = at->sum + state;
    for (int32_t j = 0; j < a->n_queries; j++) {
        const int64_t position = item->span->past + (first + j) / at->group;
        const int64_t hidden = moe__attention_first(at->layer, position) - key;
        w->first[j] = (int32_t)moe__max(0, moe__min(hidden, a->n_keys));
        w->n_visible[j] = (int32_t)moe__max(0, moe__min(position + 1 - key, a->n_keys));
        w->out[j] = at->out + moe__attention_query(at, item, first + j) * at->dv;
        any |= w->first[j] < w->n_visible[j];
        if (!at->n_parts) continue;
        a->max[j] = -INFINITY, a->sum[j] = 0;
        w->out[j] = w->part_out; // a query that sees nothing of the chunk has no part of it
        if (w->first[j] >= w->n_visible[j]) continue;
        w->out[j] += moe__attention_part_of(at, item, first + j) * at->dv;
        memset(w->out[j], 0, (size_t)at->dv * sizeof(float));
    }
    if (!any) return;
    moe__attention_gather(e, at, item, first, a->n_queries);
    e->kernels->attend(a);
    for (int32_t j = 0; j < a->n_queries && at->n_parts; j++) {
        if (w->first[j] >= w->n_visible[j]) continue;
        const int64_t part = moe__attention_part_of(at, item, first + j);
        w->part_max[part] = a->max[j];
        w->part_sum[part] = a->sum[j];
    }
}

// Where the keys and values from position `key` on are; latent ones are the same, or expanded.
MOE__PRIVATE void moe__attention_keys(const moe__eval *e, const moe__attention *at,
                                      const moe__item *item, int64_t key, moe__attend_args *a) {
    const moe__cache *cache = &item->span->sequence->caches[at->il];
    if (at->expand) {
        const moe__mla *w = at->mla;
        const int64_t first = key % MOE__MLA_KEYS + (at->carry ? item->head * MOE__MLA_KEYS : 0);
        a->type = MOE_KV_F32;
        a->k = (at->carry ? w->all_keys : w->keys) + first * at->dk;
        a->v = (at->carry ? w->all_values : w->values) + first * at->dv;
        a->k_bytes = (size_t)at->dk * sizeof(float);
        a->v_bytes = (size_t)at->dv * sizeof(float);
        if (!at->carry)
            moe__mla_expand(e, at->layer, w, &cache->k, key, a->n_keys, w->keys + first * at->dk,
                            w->values + first * at->dv);
        return;
    }
    const moe__kv *values = at->mla ? &cache->k : &cache->v;
    a->k = moe__kv_row(&cache->k, at->mla ? 0 : item->head, key);
    a->k_bytes = cache->k.row_size;
    a->v = moe__kv_row(values, at->mla ? 0 : item->head, key);
    a->v_bytes = values->row_size;
}

// One item: its queries over its keys. Outside are the keys, span by span of them, inside the
// queries, block by block, so that keys come from memory once and from the cache for all further
// blocks. An item that holds all chunks begins the states before the first and divides by the sums
// behind the last; one that holds a single chunk leaves both to moe__attention_merge.
MOE__PRIVATE void moe__attention_item(moe__eval *e, const moe__attention *at,
                                      const moe__item *item) {
    const moe__attending *w = at->w;
    const moe__span *span = item->span;
    const int64_t n_keys = span->past + (item->end - 1) / at->group + 1;
    const int64_t first_chunk =
        moe__attention_chunk(at->layer, span->past + item->begin / at->group);
    const int64_t key_end = moe__min(n_keys, item->chunk_end * MOE__ATTEND_KEYS);
    const int once = !at->expand && item->end - item->begin <= MOE__ATTEND_QUERIES;
    const int begins = item->chunk == first_chunk && !at->n_parts;
    const int ends = key_end == n_keys;
    moe__attend_args a;
    memset(&a, 0, sizeof a);
    a.type = span->sequence->info.kv_type;
    a.dk = (int32_t)at->dk, a.dv = (int32_t)at->dv;
    a.q = w->q, a.q_stride = at->dk;
    a.out = w->out;
    a.first = w->first, a.n_visible = w->n_visible;
    a.scores = w->scores;
    if (at->store && ends)
        moe__gqa_store(e, at->layer, at->il, at->gqa, span->first_row, item->head);
    if (at->expand && !at->carry) moe__mla_head(e, at->layer, at->mla, item->head);
    for (int64_t i = item->begin; i < item->end && begins; i++) {
        const int64_t state = moe__attention_state(e, at, item, i);
        moe__attention_begin(at, item->head * at->group + i % at->group, &at->max[state],
                             &at->sum[state], at->out + moe__attention_query(at, item, i) * at->dv);
    }
    for (int64_t key = item->chunk * MOE__ATTEND_KEYS, next; key < key_end; key = next) {
        next = once ? key_end : key / MOE__ATTEND_CALL * MOE__ATTEND_CALL + MOE__ATTEND_CALL;
        a.n_keys = (int32_t)(moe__min(next, key_end) - key);
        moe__attention_keys(e, at, item, key, &a);
        for (int64_t i = item->begin; i < item->end; i += MOE__ATTEND_QUERIES)
            moe__attention_call(e, at, item, i, key, &a);
    }
    for (int64_t i = item->begin; i < item->end && ends && !at->n_parts; i++)
        e->kernels->divide(at->out + moe__attention_query(at, item, i) * at->dv, at->dv,
                           at->sum[moe__attention_state(e, at, item, i)]);
}

// This thread's items; no barrier. The list of items is the same for all threads, and each counts
// through it for itself and takes those that fall to it.
MOE__PRIVATE void moe__attention_run(moe__eval *e, const moe__attention *at) {
    moe__items items;
    moe__item item;
    memset(&items, 0, sizeof items);
    while (moe__items_next(e, at, &items, &item)) moe__attention_item(e, at, &item);
}

// ---- grouped queries, forward ----------------------------------------------------------------

// Results of heads times the sigmoid of their gates, for this thread's part; no barrier.
MOE__PRIVATE void moe__gqa_gate(moe__eval *e, const moe__layer *layer, const moe__gqa *w,
                                float *out) {
    int64_t begin, end;
    moe__eval_range(e, e->n * layer->n_head * layer->head_v, MOE__LINE, &begin, &end);
    for (int64_t i = begin; i < end; i++) out[i] /= 1 + expf(-w->gate[i]);
}

// What comes between the projections and attention: queries and keys normed and turned, keys and
// values stored. Many rows are shared by the threads, with a barrier, since a query sees keys of
// rows that others stored. One row: each item makes its queries; if it holds all queries of a
// key-value head, the item of the last chunk stores the new key, which no other item reads, and the
// barrier is saved.
MOE__PRIVATE void moe__gqa_prepare(moe__eval *e, const moe__layer *layer, int il,
                                   const moe__gqa *w, int store) {
    const int64_t n_head = layer->n_head, n_kv = layer->n_head_kv, dk = layer->head_k;
    int64_t begin, end;
    if (e->n == 1) {
        moe__gqa_norm_wide(e, layer, w, 0);
        if (store) return;
        moe__eval_range(e, n_kv, 1, &begin, &end);
        for (int64_t head = begin; head < end; head++) moe__gqa_store(e, layer, il, w, 0, head);
    } else {
        moe__eval_range(e, e->n, 1, &begin, &end);
        for (int64_t t = begin; t < end; t++) {
            moe__gqa_norm_wide(e, layer, w, t);
            for (int64_t head = 0; head < n_kv; head++) moe__gqa_store(e, layer, il, w, t, head);
            for (int64_t head = 0; head < n_head; head++)
                moe__gqa_query(e, layer, w, t, head, w->q + (t * n_head + head) * dk);
        }
    }
    moe__eval_barrier(e);
}

// The lines of "mixer gqa" on the first page of >>session.
MOE__PRIVATE void moe__gqa_forward(moe__eval *e, const moe__layer *layer, int il) {
    moe__memory memory = moe__eval_memory(e);
    moe__attention at;
    moe__gqa w;
    moe__gqa_take(layer, &memory, &w);
    const moe__projection list[] = {
        {&layer->q, w.q}, {&layer->k, w.k}, {&layer->v, w.v}, {&layer->gate, w.gate}};
    memset(&at, 0, sizeof at);
    at.layer = layer, at.il = il;
    at.w = &w.attending, at.gqa = &w;
    at.max = w.attending.max, at.sum = w.attending.sum;
    at.n_kv = layer->n_head_kv, at.group = layer->n_head / layer->n_head_kv;
    at.dk = layer->head_k, at.dv = layer->head_v;
    at.q = e->n == 1 ? NULL : w.q;
    at.out = moe__acts_f32(&e->in[MOE__IN_MIXED], 0);
    moe__attention_plan(e, &at);
    at.store = e->n == 1 && at.block >= at.group;
    moe__eval_project(e, list, w.gate ? 4 : 3);
    moe__eval_fetch(e, &layer->o);
    moe__eval_barrier(e);
    moe__gqa_prepare(e, layer, il, &w, at.store);
    moe__attention_run(e, &at);
    moe__eval_barrier(e);
    if (at.n_parts) {
        moe__attention_merge_all(e, &at);
        moe__eval_barrier(e);
    }
    if (!w.gate) return;
    moe__gqa_gate(e, layer, &w, at.out);
    moe__eval_barrier(e);
}

// ---- latent attention, forward ---------------------------------------------------------------

// Heads' results from sums of latent vectors: v_b u, for this thread's heads. If items were single
// chunks, their results are joined here by the thread that needs them, without another barrier.
MOE__PRIVATE void moe__mla_values(moe__eval *e, const moe__attention *at) {
    const moe__work *work = e->work;
    const moe__layer *layer = at->layer;
    const moe__acts *sums = &e->in[MOE__IN_LATENT], *out = &e->in[MOE__IN_MIXED];
    const int64_t n_head = layer->n_head, dv = layer->head_v;
    const void **x = e->local->scratch.x;
    int64_t begin, end;
    moe__eval_range(e, n_head, 1, &begin, &end);
    for (int64_t head = begin; head < end; head++)
        for (int32_t s = 0, n = 0; s < work->n_spans; s++) {
            const moe__span *span = &work->spans[s];
            if (span->expand) continue;
            for (int64_t i = 0; i < span->n; i++, n++) {
                const int64_t row = (span->attend_row + i) * n_head + head;
                if (at->n_parts) moe__attention_merge(e, at, span, i, head);
                moe__acts_quantize(e->kernels, sums, row, row + 1);
                moe__acts_gather(e->in, &layer->v_b, NULL, row, 1, x + n);
            }
            // Rows of spans that follow one another go through the matrix together.
            if (s + 1 < work->n_spans && !work->spans[s + 1].expand) continue;
            moe__matmul(e->kernels, &layer->v_b, (int32_t)head, 0, dv, x, n,
                        moe__acts_f32(out, span->first_row + span->n - n) + head * dv, n_head * dv,
                        e->local->scratch.pack);
            n = 0;
        }
}

// Stores what the cache keeps of each row; queries from their low-rank form, ready to attend. Heads
// are shared by the threads: what a head's rows of attn_q_b make is what the same thread absorbs,
// so that no barrier comes between.
MOE__PRIVATE void moe__mla_queries(moe__eval *e, const moe__layer *layer, int il,
                                   const moe__mla *w) {
    moe__work *work = e->work;
    const int64_t n_head = layer->n_head, dk = layer->head_k;
    int64_t begin, end;
    if (e->n == 1 && e->thread == e->n_threads - 1) moe__mla_store(e, layer, il, w, 0);
    if (e->n > 1) {
        moe__eval_range(e, e->n, 1, &begin, &end);
        for (int64_t t = begin; t < end; t++) moe__mla_store(e, layer, il, w, t);
    }
    moe__eval_range(e, n_head, 1, &begin, &end);
    if (layer->q_lora) {
        moe__eval_norm(e, w->q_a, layer->q_a_norm, MOE__IN_Q_A);
        moe__acts_gather(e->in, &layer->q_b, NULL, 0, e->n, e->local->scratch.x);
        moe__matmul(e->kernels, &layer->q_b, 0, begin * dk, end * dk, e->local->scratch.x, e->n,
                    w->q + begin * dk, n_head * dk, e->local->scratch.pack);
    }
    for (int64_t head = begin; head < end; head++) {
        moe__mla_absorb(e, layer, w, head);
        for (int32_t s = 0; s < work->n_spans; s++)
            for (int64_t i = 0; i < work->spans[s].n && work->spans[s].expand; i++) {
                const int64_t t = work->spans[s].first_row + i;
                float *q = w->q + (t * n_head + head) * dk;
                moe__mla_turn(e, layer, t, q, q, q + dk - layer->n_rot);
            }
    }
    moe__eval_barrier(e);
}

// Inputs that expand, where heads are too few for the threads (V2-Lite has 16): all threads expand
// some positions for all heads, and then attend to them in small blocks of queries, with a barrier
// behind each. States of the queries are carried from one step to the next in shared memory. The
// same bits as items that do both.
MOE__PRIVATE void moe__mla_attend_together(moe__eval *e, moe__attention *at) {
    moe__mla *w = at->mla;
    at->carry = 1;
    at->max = w->max, at->sum = w->sum;
    for (int32_t s = 0; s < e->work->n_spans; s++) {
        const moe__span *span = &e->work->spans[s];
        const moe__kv *cache = &span->sequence->caches[at->il].k;
        const int64_t n_keys = span->past + span->n;
        moe__item item;
        item.span = span;
        for (int64_t key = 0; key < n_keys && span->expand; key += MOE__MLA_KEYS) {
            const int64_t end = moe__min(n_keys, key + MOE__MLA_KEYS);
            int64_t number = 0;
            moe__mla_expand_share(e, at->layer, w, cache, key, end - key);
            moe__eval_barrier(e);
            for (item.end = span->n; item.end > 0; item.end = item.begin) {
                const int64_t seen = moe__min(end, span->past + item.end);
                item.begin = (item.end - 1) / MOE__ATTEND_QUERIES * MOE__ATTEND_QUERIES;
                item.chunk = key / MOE__ATTEND_KEYS;
                item.chunk_end = (seen + MOE__ATTEND_KEYS - 1) / MOE__ATTEND_KEYS;
                if (item.chunk_end <= item.chunk) break; // these do not see so far
                for (item.head = 0; item.head < at->n_kv; item.head++)
                    if (moe__items_turn(e, number++)) moe__attention_item(e, at, &item);
            }
            moe__eval_barrier(e);
        }
    }
}

// The lines of "mixer mla" on the first page of >>session. A batch may hold spans of both kinds,
// those of short inputs and those of long ones: each kind attends for itself.
MOE__PRIVATE void moe__mla_forward(moe__eval *e, const moe__layer *layer, int il) {
    const int64_t n_head = layer->n_head, kv_lora = layer->kv_lora;
    moe__memory memory = moe__eval_memory(e);
    int absorbs = 0, expands = 0;
    moe__attention at, many;
    moe__mla w;
    moe__mla_take(layer, &memory, &w);
    const moe__projection list[] = {{&layer->kv_a, w.kv_a},
                                    {layer->q_lora ? &layer->q_a : &layer->q,
                                     layer->q_lora ? w.q_a : w.q}};
    for (int32_t s = 0; s < e->work->n_spans; s++)
        if (e->work->spans[s].expand) expands = 1;
        else absorbs = 1;
    memset(&at, 0, sizeof at);
    at.layer = layer, at.il = il;
    at.w = &w.attending, at.mla = &w;
    at.max = w.attending.max, at.sum = w.attending.sum;
    many = at;
    at.n_kv = 1, at.group = n_head; // all heads read the same rows
    at.dk = kv_lora + layer->n_rot, at.dv = kv_lora;
    at.q = w.q_absorbed, at.out = moe__acts_f32(&e->in[MOE__IN_LATENT], 0);
    many.expand = 1;
    many.n_kv = n_head, many.group = 1;
    many.dk = layer->head_k, many.dv = layer->head_v;
    many.q = w.q, many.out = moe__acts_f32(&e->in[MOE__IN_MIXED], 0);
    moe__eval_project(e, list, 2);
    moe__eval_barrier(e);
    moe__mla_queries(e, layer, il, &w);
    if (absorbs) {
        moe__attention_plan(e, &at);
        moe__attention_run(e, &at);
    }
    if (expands && w.all_keys) {
        moe__mla_attend_together(e, &many);
    } else if (expands) {
        moe__attention_plan(e, &many);
        moe__attention_run(e, &many);
    }
    moe__eval_barrier(e);
    if (!absorbs) return;
    moe__mla_values(e, &at);
    moe__eval_barrier(e);
}

// ---- the table -------------------------------------------------------------------------------

// In the order of moe__mixer_id
static const moe__mixer moe__mixers[MOE__N_MIXERS] = {
    {"gqa", moe__gqa_bind, moe__gqa_cache, moe__gqa_layout, moe__gqa_forward,
     moe__mixer_rewind_positions},
    {"mla", moe__mla_bind, moe__mla_cache, moe__mla_layout, moe__mla_forward,
     moe__mixer_rewind_positions},
};

// ==============================================================================================
// >>load
//
// Opening a model: what >>model binds is called in its order, and the weights are brought to where
// they are read fast. That is done by three means, each a wish that the system may refuse:
//
//   placing   (moe_model_options.numa) pages are moved to the memory node of the threads that will
//             read them, or in turn to all nodes
//   paging    (.pages) a mapping that is read slowly is copied to huge pages, see >>pages
//   locking   (.mlock) pages stay in memory
//
// What came of them is recorded in moe_model_memory. Only after the tensors are known to be right:
// a file that is refused costs no time.
// ==============================================================================================

// ---- placing the weights in memory -----------------------------------------------------------

// A team with threads on every memory node touches the pages of weights, each thread those that
// are to lie on its node, so that new pages appear there; then pages that were elsewhere before
// (of a file that is in the system's cache, or of a copy) are moved.
typedef struct moe__place {
    const moe_gguf *gguf;
    const moe__machine *machine;
    moe_pool *pool;
    moe_numa numa;
    int (*progress)(void *user, float fraction);
    void *progress_user;
    size_t page;
    uint64_t n_bytes;      // of all weights
    uint64_t done, placed; // atomic: bytes touched; of pages that lie where they should
    int stop, refused;     // atomic
} moe__place;

// Pages from .. to - 1, by one thread of node k.
MOE__PRIVATE void moe__place_pages(moe__place *p, uintptr_t from, uintptr_t to, int32_t k) {
    enum { BATCH = 512 };
    const void *pages[BATCH];
    int node[BATCH], status[BATCH];
    while (from < to && !__atomic_load_n(&p->stop, __ATOMIC_RELAXED)) {
        int n = 0;
        uint64_t placed = 0;
        for (; n < BATCH && from < to; n++, from += p->page) {
            if (p->numa == MOE_NUMA_INTERLEAVE)
                k = (int32_t)(from / p->page % (size_t)p->machine->n_nodes);
            pages[n] = (const void *)from;
            node[n] = p->machine->node[k];
            status[n] = -1;
            (void)*(const volatile uint8_t *)from;
        }
        if (!moe__machine_move(pages, node, n, status) ||
            !moe__machine_move(pages, NULL, n, status))
            __atomic_store_n(&p->refused, 1, __ATOMIC_RELAXED);
        for (int i = 0; i < n; i++) placed += status[i] == node[i] ? p->page : 0;
        __atomic_fetch_add(&p->placed, placed, __ATOMIC_RELAXED);
        __atomic_fetch_add(&p->done, (uint64_t)n * p->page, __ATOMIC_RELAXED);
    }
}

// Whether each thread reads the same rows of a tensor all the time, so that they can be placed on
// its node. Not of token_embd, of which single rows are read, nor of attn_k_b and attn_v_b, whose
// heads change threads with the shape of a batch.
MOE__PRIVATE int moe__place_has_owners(const moe_gguf_tensor *tensor) {
    return tensor->n_dims > 1 && !strstr(tensor->name, "token_embd.") &&
           !strstr(tensor->name, ".attn_k_b.") && !strstr(tensor->name, ".attn_v_b.");
}

// This thread's pages of a tensor: of its node's rows of each expert its share. A page that two
// nodes have rows on belongs to the first.
MOE__PRIVATE void moe__place_tensor(moe__place *p, const moe_gguf_tensor *tensor, int thread,
                                    int n_threads) {
    const moe__nodes *nodes = &p->pool->nodes;
    const int owned = p->numa == MOE_NUMA_OWNER && moe__place_has_owners(tensor);
    const int64_t rows = owned ? tensor->ne[1] : 1;
    const int64_t units = (rows + MOE__ROW_UNIT - 1) / MOE__ROW_UNIT;
    const int64_t experts = owned ? tensor->ne[2] * tensor->ne[3] : 1;
    const uintptr_t row_size = (uintptr_t)(tensor->size / (uint64_t)(rows * experts));
    const uintptr_t last_byte = (uintptr_t)tensor->data + (uintptr_t)tensor->size;
    const int32_t k = moe__nodes_of(nodes, thread);
    int64_t first = 0, last = rows, member = thread, members = n_threads;
    if (owned) {
        first = moe__min(rows, units * nodes->first[k] / n_threads * MOE__ROW_UNIT);
        last = moe__min(rows, units * nodes->first[k + 1] / n_threads * MOE__ROW_UNIT);
        member -= nodes->first[k];
        members = nodes->first[k + 1] - nodes->first[k];
    }
    for (int64_t e = 0; e < experts; e++) {
        const uintptr_t base = (uintptr_t)tensor->data + (uintptr_t)(e * rows) * row_size;
        const uintptr_t from = base + (uintptr_t)first * row_size;
        const uintptr_t to = base + (uintptr_t)last * row_size;
        const int64_t piece = (int64_t)((from + p->page - 1) / p->page);
        const int64_t n_pieces = (int64_t)((to + p->page - 1) / p->page) - piece;
        int64_t begin, end;
        if (n_pieces <= 0) continue;
        moe__pool_range(n_pieces, 1, (int)member, (int)members, &begin, &end);
        const uintptr_t start = (uintptr_t)(piece + begin) * p->page;
        const uintptr_t stop = (uintptr_t)(piece + end) * p->page;
        if (tensor->data && begin < end) // what is behind the tensor need not be mapped
            moe__place_pages(p, start, stop < last_byte ? stop : last_byte, k);
    }
}

MOE__PRIVATE void moe__place_job(void *context, int thread, int n_threads) {
    moe__place *p = (moe__place *)context;
    moe__policy before, policy;
    const int known = moe__policy_get(&before);
    moe__policy_init(&policy, p->machine,
                     p->numa == MOE_NUMA_OWNER ? MOE__POLICY_PREFERRED : MOE__POLICY_INTERLEAVE,
                     moe__nodes_of(&p->pool->nodes, thread));
    if (!known || !moe__policy_set(&policy)) __atomic_store_n(&p->refused, 1, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < moe_gguf_n_tensors(p->gguf); i++) {
        moe__place_tensor(p, moe_gguf_tensor_at(p->gguf, i), thread, n_threads);
        const double done = (double)__atomic_load_n(&p->done, __ATOMIC_RELAXED);
        const float fraction = (float)(done / (double)p->n_bytes);
        if (thread == 0 && p->progress && !p->stop &&
            !p->progress(p->progress_user, fraction < 1 ? fraction : 1))
            __atomic_store_n(&p->stop, 1, __ATOMIC_RELAXED);
    }
    if (known) moe__policy_set(&before);
}

// Places all weights; what the system refuses shows in model->memory only.
MOE__PRIVATE moe_status moe__place_weights(moe_model *model, const moe__machine *machine,
                                           const moe_model_options *options, moe_error *error) {
    moe_pool_options pool_options;
    moe__place p;
    memset(&p, 0, sizeof p);
    memset(&pool_options, 0, sizeof pool_options);
    pool_options.allocator = model->allocator;
    pool_options.pin = MOE_ON;
    p.pool = moe_pool_open(&pool_options, error);
    if (!p.pool) return MOE_ERROR_THREAD;
    moe__machine_nodes(machine, p.pool->n_threads, &p.pool->nodes);
    p.gguf = model->gguf;
    p.machine = machine;
    p.numa = options->numa;
    p.progress = options->progress;
    p.progress_user = options->progress_user;
    p.page = moe__machine_page();
    for (int64_t i = 0; i < moe_gguf_n_tensors(p.gguf); i++)
        p.n_bytes += moe_gguf_tensor_at(p.gguf, i)->size;
    moe__pool_run(p.pool, p.pool->n_threads, moe__place_job, &p, NULL);
    moe_pool_close(p.pool);
    model->memory.n_bytes_placed = p.placed < p.n_bytes ? p.placed : p.n_bytes;
    if (!p.refused) model->memory.numa = p.numa;
    if (!p.stop) return MOE_OK;
    return moe__fail(error, MOE_ERROR_CANCELLED, "progress",
                     "loading was cancelled by the progress callback");
}

// Keeps weights in memory, or (lock = 0) no longer; returns the bytes for which the system
// agreed, up to the first for which it did not.
MOE__PRIVATE uint64_t moe__place_lock(const moe_gguf *gguf, int lock) {
    uint64_t bytes = 0;
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        if (!tensor->data || !tensor->size) continue;
        if (lock ? mlock(tensor->data, (size_t)tensor->size)
                 : munlock(tensor->data, (size_t)tensor->size))
            break;
        bytes += tensor->size;
    }
    return bytes;
}

// ---- pages of the weights --------------------------------------------------------------------

MOE_API uint64_t moe_model_huge_bytes(const moe_model *model) {
    uint64_t sum = 0;
    for (int32_t i = 0; model && i < model->gguf->n_parts; i++) {
        const moe__pages *pages = &model->gguf->pages[i];
        if (pages->data) sum += moe__pages_huge("/proc/self/smaps", pages->data, pages->size);
    }
    return sum;
}

// A copy as it was granted: appends what is not on huge pages to the text.
MOE__PRIVATE void moe__paging_granted(const moe_model *model, moe_model_memory *memory) {
    const uint64_t bytes = moe_model_huge_bytes(model);
    if (!memory->n_bytes_copied || bytes + bytes / 64 + MOE__PAGES_HUGE > memory->n_bytes_copied)
        return;
    moe__paging_write(memory->text, sizeof memory->text, " (");
    moe__paging_write_size(memory->text, sizeof memory->text, bytes);
    moe__paging_write(memory->text, sizeof memory->text, " of it granted)");
}

// What lies where, once nothing more is done with the pages.
MOE__PRIVATE void moe__paging_record(const moe_model *model, moe_model_memory *memory) {
    const moe__paging *paging = &model->paging;
    memory->n_bytes_copied = moe__paging_copied(paging);
    memory->pages = memory->n_bytes_copied ? MOE_PAGES_COPY : MOE_PAGES_MAP;
    memory->map_rate = paging->rates.map;
    memory->copy_rate = paging->rates.copy;
    moe__paging_say(paging, memory->text, sizeof memory->text);
    moe__paging_granted(model, memory);
}

// The gguf's pages are what the options say, or what its own options made of them.
MOE__PRIVATE void moe__paging_as_asked(moe_model *model) {
    const moe_gguf *gguf = model->gguf;
    moe_model_memory *memory = &model->memory;
    for (int32_t i = 0; i < gguf->n_parts; i++) memory->n_bytes_copied += gguf->pages[i].n_copied;
    memory->pages = memory->n_bytes_copied ? MOE_PAGES_COPY : MOE_PAGES_MAP;
    moe__paging_write_size(memory->text, sizeof memory->text, moe_gguf_file_size(gguf));
    moe__paging_write(memory->text, sizeof memory->text, "%s",
                      !gguf->pages[0].data             ? " in the caller's memory"
                      : memory->pages == MOE_PAGES_MAP ? " mapped"
                      : gguf->small_pages              ? " copied to small pages"
                                                       : " copied to huge pages");
    if (!gguf->small_pages) moe__paging_granted(model, memory);
}

// Looks after the pages of a mapped gguf, or leaves them alone.
MOE__PRIVATE moe_status moe__paging_begin(moe_model *model, const moe_model_options *options,
                                          moe_error *error) {
    moe_gguf *gguf = (moe_gguf *)model->gguf; // of its pages the addresses never change
    moe__paging *paging = &model->paging;
    const moe_pages pages = options ? options->pages : MOE_PAGES_AUTO;
    const char *why;
    int code;
    if (gguf->options.pages != MOE_PAGES_AUTO || pages == MOE_PAGES_MAP || !gguf->pages[0].data ||
        model->memory.numa || __atomic_exchange_n(&gguf->looked_after, 1, __ATOMIC_ACQ_REL)) {
        moe__paging_as_asked(model);
        return MOE_OK;
    }
    paging->files = gguf->pages;
    paging->n_files = gguf->n_parts;
    paging->size = moe_gguf_file_size(gguf);
    paging->allocator = model->allocator;
    paging->progress = options ? options->progress : NULL;
    paging->progress_user = options ? options->progress_user : NULL;
    if (pages == MOE_PAGES_COPY) {
        code = moe__paging_all(paging, NULL, moe__paging_replace_chunk);
        moe__paging_as_asked(model);
        why = moe__errno_words(code);
        if (code && code != ECANCELED && why)
            return moe__fail(error, MOE_ERROR_MEMORY, "pages",
                             "the file cannot be copied into memory: %s", why);
        if (code && code != ECANCELED)
            return moe__fail(error, MOE_ERROR_MEMORY, "pages",
                             "the file cannot be copied into memory: system error %d", code);
    } else {
        code = moe__paging_open(paging);
        if (options && options->mlock == MOE_ON) paging->state = MOE__PAGING_DONE;
        moe__paging_record(model, &model->memory);
    }
    if (!code) return MOE_OK;
    return moe__fail(error, MOE_ERROR_CANCELLED, "progress",
                     "loading was cancelled by the progress callback");
}

// A session has generated a token, in so many seconds, with threads of this pool.
MOE__INLINE void moe__paging_token(const moe_model *model, double seconds, moe_pool *pool) {
    if (__atomic_load_n(&model->paging.state, __ATOMIC_RELAXED) == MOE__PAGING_DONE) return;
    moe_model *mutable_model = (moe_model *)model; // what it computes does not change
    if (!moe__paging_tend(&mutable_model->paging, seconds, pool)) return;
    mutable_model->later = model->memory;
    moe__paging_record(model, &mutable_model->later);
    __atomic_store_n(&mutable_model->is_later, 1, __ATOMIC_RELEASE);
}

// What the options ask about memory, once the tensors are known to be right.
MOE__PRIVATE moe_status moe__place_all(moe_model *model, const moe_model_options *options,
                                       moe_error *error) {
    moe__machine machine;
    moe_model_memory *memory = &model->memory;
    moe_status status = MOE_OK;
    memory->n_nodes = 1;
    if (options && options->numa) { // two files per processor: only if needed
        moe__machine_this(&machine);
        memory->n_nodes = machine.n_nodes;
        if (machine.n_nodes > 1) status = moe__place_weights(model, &machine, options, error);
    }
    if (!status) status = moe__paging_begin(model, options, error);
    if (!status && options && options->mlock == MOE_ON)
        memory->n_bytes_locked = moe__place_lock(model->gguf, 1);
    return status;
}

// ---- opening ---------------------------------------------------------------------------------

// Some files have no tokenizer: they are run with token ids alone.
MOE__PRIVATE int moe__load_has_vocab(const moe_gguf *gguf) {
    static const char *const none[] = {"none", "no_vocab", "test"};
    moe_string name;
    const void *cursor = NULL;
    if (!moe_gguf_value_string(moe_gguf_find_value(gguf, "tokenizer.ggml.model"), &cursor, &name))
        return 0;
    for (size_t i = 0; i < sizeof none / sizeof none[0]; i++)
        if (name.size == strlen(none[i]) && !memcmp(name.data, none[i], name.size)) return 0;
    return 1;
}

MOE_API moe_model *moe_model_open_gguf(const moe_gguf *gguf, const moe_model_options *options,
                                       moe_error *error) {
    moe_allocator allocator;
    moe__loader loader;
    if (!gguf) {
        moe__fail(error, MOE_ERROR_ARGUMENT, "gguf", "gguf is NULL");
        return NULL;
    }
    if (options && ((unsigned)options->numa > MOE_NUMA_OWNER || !moe__is_switch(options->mlock) ||
                    (unsigned)options->pages > MOE_PAGES_COPY)) {
        moe__fail(error, MOE_ERROR_ARGUMENT, "options",
                  "numa %d, mlock %d or pages %d is out of range", (int)options->numa,
                  (int)options->mlock, (int)options->pages);
        return NULL;
    }
    if (moe__allocator_init(&allocator, options ? &options->allocator : NULL, error)) return NULL;
    moe_model *model = (moe_model *)moe__alloc(&allocator, sizeof *model);
    if (!model) {
        moe__fail(error, MOE_ERROR_MEMORY, "model", "no memory for a model");
        return NULL;
    }
    model->allocator = allocator;
    model->gguf = gguf;
    loader.used = (uint8_t *)moe__alloc(&allocator, (size_t)gguf->n_tensors + 1);
    if (!loader.used) {
        moe__fail(error, MOE_ERROR_MEMORY, "model", "no memory for the model's tables");
        moe__free(&allocator, model);
        return NULL;
    }
    loader.model = model;
    loader.gguf = gguf;
    loader.error = error;
    loader.status = MOE_OK;
    fenv_t callers;
    moe__floats_begin(&callers);
    moe__load_family(&loader);
    if (!loader.status) moe__load_hparams(&loader);
    if (!loader.status && moe__load_has_vocab(gguf)) {
        model->vocab = moe_vocab_open(gguf, error);
        if (!model->vocab) loader.status = MOE_ERROR_FORMAT;
    }
    if (!loader.status) moe__load_globals(&loader);
    for (int il = 0; il < model->info.n_layer && !loader.status; il++) {
        moe__layer *layer = &model->layers[il];
        moe__mixers[layer->mixer].bind(&loader, layer, il);
        moe__load_layer(&loader, layer, il);
        if (moe__has(model, MOE__BIASES)) moe__load_check_biases(&loader, layer, il);
    }
    moe__load_check_used(&loader);
    moe__free(&allocator, loader.used);
    if (!loader.status) loader.status = moe__place_all(model, options, error);
    moe__floats_end(&callers);
    if (!loader.status) return model;
    moe_model_close(model);
    return NULL;
}

MOE_API moe_model *moe_model_open(const char *path, const moe_model_options *options,
                                  moe_error *error) {
    moe_gguf_options gguf_options;
    moe__policy before;
    int spread = 0; // a copy is read in turn to all nodes, so that no node runs full
    int32_t nodes = 1;
    memset(&gguf_options, 0, sizeof gguf_options);
    if (options) {
        gguf_options.allocator = options->allocator;
        gguf_options.pages = options->pages;
        gguf_options.prefault = options->prefault;
        gguf_options.progress = options->progress;
        gguf_options.progress_user = options->progress_user;
    }
    if (options && options->numa) {
        moe__machine machine;
        moe__policy policy;
        moe__machine_this(&machine);
        moe__policy_init(&policy, &machine, MOE__POLICY_INTERLEAVE, 0);
        if (machine.n_nodes == 1) gguf_options.prefault = MOE_ON;
        else spread = moe__policy_get(&before) && moe__policy_set(&policy);
        nodes = machine.n_nodes;
    }
    moe_gguf *gguf = moe__gguf_open(path, &gguf_options, nodes > 1, error);
    if (spread) moe__policy_set(&before);
    if (!gguf) return NULL;
    moe_model *model = moe_model_open_gguf(gguf, options, error);
    if (model)
        model->own_gguf = gguf;
    else
        moe_gguf_close(gguf);
    return model;
}

MOE_API void moe_model_close(moe_model *model) {
    if (!model) return;
    moe_allocator allocator = model->allocator;
    while (model->owned) {
        void *memory = model->owned;
        memcpy(&model->owned, memory, sizeof(void *));
        moe__free(&allocator, memory);
    }
    moe_vocab_close(model->vocab);
    if (model->memory.n_bytes_locked) moe__place_lock(model->gguf, 0);
    if (model->paging.files) // another model of the caller's gguf may look after them
        __atomic_store_n(&((moe_gguf *)model->gguf)->looked_after, 0, __ATOMIC_RELEASE);
    moe_gguf_close(model->own_gguf);
    moe__free(&allocator, model);
}

MOE_API const moe_vocab *moe_model_vocab(const moe_model *model) {
    return model ? model->vocab : NULL;
}
MOE_API const moe_gguf *moe_model_gguf(const moe_model *model) {
    return model ? model->gguf : NULL;
}
MOE_API const moe_model_info *moe_model_get_info(const moe_model *model) {
    return model ? &model->info : NULL;
}
MOE_API const moe_model_memory *moe_model_get_memory(const moe_model *model) {
    if (!model) return NULL;
    return __atomic_load_n(&model->is_later, __ATOMIC_ACQUIRE) ? &model->later : &model->memory;
}

// ==============================================================================================
// >>session
//
// The forward pass over a batch (moe__forward), and sessions: opening, evaluating, going back.
//
// ONE LAYER IN FORMULAS. x is the residual of a row (n_embd values), p its position, N(v) = v * w /
// sqrt(mean(v^2) + eps) the norm with weights w (moe__kernels.rms_norm), R_p the rotation by p
// (moe__rope_apply). Products with capital letters are matrices of the file. All threads go through
// these lines from top to bottom; products are shared by rows of the matrix. A "|" is a barrier,
// behind which every thread sees what all have made; a ":" is one if the batch has many rows, which
// are shared; of one row each thread makes such small things for itself.
//
//     h = N(x)                            attn_norm                            :
//     m = mixer(h)                        see below
//     x += O m                            attn_output; m quantized before it : |
//     h = N(x)                            ffn_norm                             :
//     s = G h                             ffn_gate_inp: a logit per expert     | (of one row)
//     E, w = the best experts, weights    moe__router_select                   :
//     a_e = act(Gate_e h) * (Up_e h)      ffn_gate_exps, ffn_up_exps, e in E   |
//     quantize a_e                                                             :
//     x += sum over e of w_e Down_e a_e   ffn_down_exps                        |
//
// A dense layer has one expert, which all rows have chosen with weight 1, and neither s nor E.
//
// Mixer gqa, grouped-query attention. Head i of n_head reads keys and values of head g = i / group:
//
//     q, k, v = Q h, K h, V h             attn_q, attn_k, attn_v               |
//     q_i = R_p(N(q_i)) * kq_scale        norms where the family has them
//     cache k[p], v[p] = R_p(N(k_g)), v_g                                      :
//     m_i = sum over j <= p of softmax_j(q_i . k[j]) v[j]                      |
//     m_i *= sigmoid(gate_i)              attn_gate, of few families           |
//
// Mixer mla, multi-head latent attention (DeepSeek-V2 report, 2.1). What is cached is one vector
// for all heads, c[p] = (latent, rotated key):
//
//     (l, r), q = A h, Q h                attn_kv_a_mqa; attn_q, or attn_q_b of
//                                         N(attn_q_a h)                        | (:)
//     cache c[p] = (N(l), R_p(r))
//     q_i = (K_i q_i, R_p(rest of q_i))   attn_k_b: the query is absorbed      |
//     u_i = sum over j <= p of softmax_j(q_i . c[j]) latent[j]                 |
//     m_i = V_i u_i                       attn_v_b                             |
//   or, in inputs of 128 tokens and more, keys and values are expanded from the cache:
//     k_ij, v_ij = (K_i^T latent[j], rotated[j]), V_i latent[j]
//     m_i = sum over j <= p of softmax_j(q_i . k_ij) v_ij                      |
//
// So one token takes 6 barriers per layer with gqa, 8 with mla (a dense layer: one less), one
// before the first layer and one behind the logits. One more each:
//   gates of heads (attn_gate with gqa)
//   items that are single chunks of keys, since heads alone are too few for the threads: their
//     results are joined (gqa; mla joins them where V_i is applied)
//   items smaller than a group of heads: the key is stored before any of them begins (gqa)
//   a schedule that lets threads compute the same row of Down for different experts
//   each norm behind a part (post norms: two)
//
// Why barriers and not a graph of tasks: between two of them all threads do the same thing to
// different rows, so that which thread computes what is arithmetic, and a matrix' rows stay with
// the thread whose caches and memory node they are near.
// ==============================================================================================

// ---- the forward pass -----------------------------------------------------------------------

// The weight of the shared experts for token t: 1, or (Qwen2-MoE) the sigmoid of a product with a
// vector of its own; times the residual's scale.
MOE__PRIVATE float moe__route_shared(const moe__eval *e, const moe__layer *layer,
                                     int64_t t) {
    const int64_t n = e->model->info.n_embd;
    const float scale = e->model->residual_scale;
    float z;
    if (!layer->shared_gate) return scale;
    e->kernels->type[MOE__INDEX_F32].dot((const uint8_t *)layer->shared_gate,
                                         (size_t)n * sizeof z, 1, n,
                                         moe__acts_f32(&e->in[MOE__IN_NORMED], t), &z);
    return scale / (1 + expf(-z));
}

// The experts of row t from its router's logits, which are overwritten.
MOE__PRIVATE void moe__route_row(moe__eval *e, const moe__layer *layer, int64_t t) {
    moe__work *work = e->work;
    const moe__router *router = &e->model->router;
    moe__router_select(e->kernels, router, work->router_logits + t * router->n_expert,
                       layer->probs_bias, work->experts + t * router->n_used,
                       work->expert_weights + t * router->n_used);
    work->shared_weights[t] = moe__route_shared(e, layer, t);
}

// Router's logits and choices. One token: each thread computes some logits and then chooses for
// itself; many: a thread does all of it for some tokens, unless they are too few for that. The
// router's matrix is small: n_expert rows.
MOE__PRIVATE void moe__forward_router(moe__eval *e, const moe__layer *layer) {
    moe__work *work = e->work;
    moe__local *local = e->local;
    const moe__router *router = &e->model->router;
    const moe__projection list = {&layer->router, work->router_logits};
    int64_t begin, end;
    moe__eval_range(e, e->n, 1, &begin, &end);
    if (e->n >= 2 * (int64_t)e->n_threads && e->n > 1) {
        if (begin < end) {
            moe__acts_gather(e->in, &layer->router, NULL, begin, end - begin, local->scratch.x);
            moe__matmul(e->kernels, &layer->router, 0, 0, router->n_expert, local->scratch.x,
                        end - begin, work->router_logits + begin * router->n_expert,
                        router->n_expert, local->scratch.pack);
        }
    } else {
        moe__eval_project(e, &list, 1);
        moe__eval_barrier(e);
    }
    if (e->n == 1) {
        memcpy(local->router_logits, work->router_logits,
               (size_t)router->n_expert * sizeof(float));
        moe__router_select(e->kernels, router, local->router_logits, layer->probs_bias,
                           local->experts, local->expert_weights);
        local->shared_weight = moe__route_shared(e, layer, 0);
        return;
    }
    for (int64_t t = begin; t < end; t++) moe__route_row(e, layer, t);
    moe__eval_barrier(e);
}

// Which experts see which tokens: one entry per active expert, then the shared ones. Thread 0
// counts what was chosen (moe_session_expert_counts).
MOE__PRIVATE void moe__forward_route(moe__eval *e, const moe__layer *layer) {
    moe__work *work = e->work;
    moe__local *local = e->local;
    const moe__router *router = &e->model->router;
    const int one = e->n == 1;
    const int32_t *experts = one ? local->experts : work->experts;
    moe__forward_router(e, layer);
    moe__dispatch_routed(&local->dispatch, &layer->experts, router, experts,
                         one ? local->expert_weights : work->expert_weights, e->n);
    const int64_t first = (layer - e->model->layers) * e->model->info.n_expert;
    for (int64_t i = 0; e->thread == 0 && i < e->n * router->n_used; i++)
        work->rows[i / router->n_used].sequence->expert_counts[first + experts[i]]++;
    if (layer->shared.gate.data)
        moe__dispatch_all(&local->dispatch, &layer->shared, e->n, work->numbers,
                          one ? &local->shared_weight : work->shared_weights);
}

// sum += weight * (down hidden) over the entries, in their order. A thread that owns rows of all
// entries adds to them as it goes. Where the schedule lets several threads compute a row, each
// for other entries, products are kept apart and added up behind a barrier: in the same order, so
// with the same bits.
MOE__PRIVATE void moe__forward_down(moe__eval *e, const moe__task *task, float *sum) {
    moe__work *work = e->work;
    const moe__schedule_info *schedule = e->batch->lead->schedule;
    const moe__scratch *scratch = &e->local->scratch;
    const int64_t n_embd = e->model->info.n_embd;
    const int apart = !schedule->owns_rows(task, e->n_threads);
    moe__range range;
    for (int32_t i = 0; schedule->range(task, e->thread, e->n_threads, i, &range); i++) {
        const moe__entry *entry = &task->entries[range.entry];
        moe__range_fetch(schedule, task, e->thread, e->n_threads, i + 1);
        if (apart)
            moe__experts_down_apart(e->kernels, entry, range.begin, range.end, e->in,
                                    work->expert_out + range.entry * n_embd, scratch);
        else
            moe__experts_down(e->kernels, entry, range.begin, range.end, e->in, sum, scratch);
    }
    if (!apart) return;
    moe__eval_barrier(e);
    int64_t begin, end;
    moe__eval_range(e, n_embd, MOE__LINE, &begin, &end);
    for (int32_t i = 0; i < task->n_entries; i++)
        e->kernels->axpy(task->entries[i].weights ? task->entries[i].weights[0] : 1.0f,
                         work->expert_out + i * n_embd + begin, end - begin, sum + begin);
}

// Where rows of a layer's feed-forward matrices begin in all threads: at multiples of what the most
// demanding of its matrices wants (interleaved types, tiles), one number for all of them, since a
// schedule gives out rows of all entries alike.
MOE__PRIVATE int64_t moe__forward_unit(const moe__eval *e, const moe__layer *layer) {
    const moe__ffn *ffns[] = {&layer->experts, &layer->shared, &layer->dense};
    int64_t unit = 1;
    for (int i = 0; i < 3; i++) {
        unit = moe__max(unit, moe__eval_row_unit(&ffns[i]->gate, e->n));
        unit = moe__max(unit, moe__eval_row_unit(&ffns[i]->up, e->n));
        unit = moe__max(unit, moe__eval_row_unit(&ffns[i]->down, e->n));
    }
    return unit;
}

// sum += feed-forward network of the normed residual, by the dispatch's entries. next: the matrix
// that is read first after it. Three phases: who sees what (each thread finds out for itself);
// gate and up of all entries, whose hidden vectors are shared; down.
MOE__PRIVATE void moe__forward_ffn(moe__eval *e, const moe__layer *layer, float *sum,
                                   const moe__matrix *next) {
    moe__work *work = e->work;
    moe__local *local = e->local;
    const moe__schedule_info *schedule = e->batch->lead->schedule;
    moe__task task;
    moe__range range;
    local->dispatch.n_entries = local->dispatch.n_routed = 0;
    moe__eval_fit(e, &layer->experts.down);
    moe__eval_fit(e, &layer->shared.down);
    moe__eval_fit(e, &layer->dense.down);
    if (layer->is_moe)
        moe__forward_route(e, layer);
    else
        moe__dispatch_all(&local->dispatch, &layer->dense, e->n, work->numbers, work->scales);
    task.entries = local->dispatch.entries;
    task.n_entries = local->dispatch.n_entries;
    task.n_routed = local->dispatch.n_routed;
    task.one_token = e->n == 1;
    task.unit = moe__forward_unit(e, layer);
    task.nodes = &e->batch->nodes;
    task.down = 0;
    for (int32_t i = 0; schedule->range(&task, e->thread, e->n_threads, i, &range); i++) {
        moe__range_fetch(schedule, &task, e->thread, e->n_threads, i + 1);
        moe__experts_gate_up(e->kernels, &task.entries[range.entry], range.begin, range.end, e->in,
                             &local->scratch);
    }
    if (e->thread == 0 && layer->is_moe)
        e->batch->lead->stats.n_expert_groups = schedule->schedule == MOE_SCHEDULE_PARALLEL
                                                    ? moe__schedule_groups(&task, e->n_threads)
                                                    : 1;
    task.down = 1;
    moe__range_fetch(schedule, &task, e->thread, e->n_threads, 0);
    moe__eval_barrier(e);
    if (layer->is_moe)
        moe__eval_quantize(e, MOE__IN_ROUTED, e->n * e->model->info.n_expert_used);
    if (layer->shared.gate.data) moe__eval_quantize(e, MOE__IN_SHARED, e->n);
    if (!layer->is_moe) moe__eval_quantize(e, MOE__IN_DENSE, e->n);
    if (e->n > 1) moe__eval_barrier(e);
    moe__forward_down(e, &task, sum);
    moe__eval_fetch(e, next);
    moe__eval_barrier(e);
}

// Where a part of a layer adds up what it computes: the residual, or, if it is normed before it
// joins it (post norms: x += N(part)), an empty branch, of which this thread clears its share. A
// barrier comes before anybody adds.
MOE__PRIVATE float *moe__forward_branch(moe__eval *e, const float *post_norm) {
    int64_t begin, end;
    if (!post_norm) return e->work->residual;
    moe__eval_range(e, e->n * e->model->info.n_embd, MOE__LINE, &begin, &end);
    memset(e->work->branch + begin, 0, (size_t)(end - begin) * sizeof(float));
    return e->work->branch;
}

// residual += norm(branch) * post_norm, if there is one. Each thread norms the whole of a single
// row, from which it needs a part only: the sum of squares is of all of it.
MOE__PRIVATE void moe__forward_join(moe__eval *e, const float *post_norm) {
    const moe__work *work = e->work;
    const int64_t n_embd = e->model->info.n_embd;
    float *normed = e->local->scratch.up; // as long as the longest vector
    int64_t begin, end;
    if (!post_norm) return;
    moe__eval_range(e, e->n == 1 ? n_embd : e->n, e->n == 1 ? MOE__LINE : 1, &begin, &end);
    if (e->n == 1) {
        e->kernels->rms_norm(work->branch, post_norm, n_embd, e->model->eps, normed);
        for (int64_t i = begin; i < end; i++) work->residual[i] += normed[i];
    } else {
        for (int64_t t = begin; t < end; t++) {
            e->kernels->rms_norm(work->branch + t * n_embd, post_norm, n_embd, e->model->eps,
                                 normed);
            for (int64_t i = 0; i < n_embd; i++) work->residual[t * n_embd + i] += normed[i];
        }
    }
    moe__eval_barrier(e);
}

// Token embeddings and positions of a batch. cos and sin depend on the position alone: they are
// computed once per row for all layers and heads, for each rope that some layer has.
MOE__PRIVATE void moe__forward_begin(moe__eval *e) {
    const moe_model *model = e->model;
    moe__work *work = e->work;
    const int64_t n_embd = model->info.n_embd;
    int64_t begin, end;
    moe__eval_range(e, e->n, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        float *x = work->residual + t * n_embd;
        moe__matrix_to_f32(e->kernels, &model->token_embd, 0, work->rows[t].token, 1, x);
        for (int64_t i = 0; i < n_embd && model->embd_scale != 1; i++) x[i] *= model->embd_scale;
    }
    if (e->n == 1) begin = 0, end = 1; // each thread for itself
    for (int64_t t = begin; t < end; t++)
        for (int i = 0; i < MOE__N_ROPES; i++) {
            float *tables = e->n == 1 ? e->local->rope : work->rope + t * model->n_rope;
            moe__rope_table(&model->ropes[i], work->rows[t].position,
                            tables + model->ropes[i].table_at);
        }
    moe__eval_barrier(e);
}

MOE__INLINE void moe__forward_scale(const moe__eval *e, float *logits, int64_t n) {
    const float scale = e->model->logit_scale;
    for (int64_t i = 0; i < n && scale != 1; i++) logits[i] *= scale;
}

// Logits of the rows that somebody wants them of: of each sequence's last row, or of all its rows
// (keep_all_logits). The output matrix, n_vocab rows, is read once for all of them, and not at all
// for a part of a prompt.
MOE__PRIVATE void moe__forward_logits(moe__eval *e) {
    const moe_model *model = e->model;
    moe__work *work = e->work;
    const moe__matrix *output = &model->output;
    const moe__scratch *scratch = &e->local->scratch;
    const int64_t n_embd = model->info.n_embd;
    float **out = (float **)(void *)scratch->x_up; // where a row's logits go
    int64_t n = 0, begin, end;
    for (int32_t s = 0; s < work->n_spans; s++) n += work->spans[s].n_logits;
    if (n == 0) return;
    // One: each thread for itself
    const moe__acts *x = n == 1 ? &e->local->in[MOE__IN_NORMED] : &work->in[MOE__IN_NORMED];
    moe__eval_range(e, n, 1, &begin, &end);
    const int64_t wanted = n;
    n = 0;
    for (int32_t s = 0; s < work->n_spans; s++) {
        const moe__span *span = &work->spans[s];
        for (int32_t i = span->n - span->n_logits; i < span->n; i++, n++) {
            out[n] = span->logits + (span->n_logits > 1 ? (int64_t)i * output->n_out : 0);
            if (wanted > 1 && (n < begin || n >= end)) continue; // another thread's
            e->kernels->rms_norm(work->residual + (span->first_row + i) * n_embd,
                                 model->output_norm, n_embd, model->eps, moe__acts_f32(x, n));
            moe__acts_quantize(e->kernels, x, n, n + 1);
        }
    }
    if (n > 1) moe__eval_barrier(e);
    for (int64_t i = 0; i < n; i++) scratch->x[i] = moe__acts_row(x, output->type->act, i);
    moe__eval_range(e, output->n_out, moe__eval_row_unit(output, n), &begin, &end);
    if (n == 1) {
        moe__matmul(e->kernels, output, 0, begin, end, scratch->x, 1, out[0] + begin, 0,
                    scratch->pack);
        moe__forward_scale(e, out[0] + begin, end - begin);
    } else {
        for (int64_t row = begin; row < end; row += MOE__TILE_ROWS) {
            const int64_t n_rows = moe__min(end - row, MOE__TILE_ROWS);
            moe__matmul_tile(e->kernels, output, 0, row, n_rows, scratch->x, n, scratch->gate,
                             MOE__TILE_ROWS, scratch->pack,
                             moe__next_tile(output, 0, row + n_rows, end));
            for (int64_t i = 0; i < n; i++) {
                memcpy(out[i] + row, scratch->gate + i * MOE__TILE_ROWS,
                       (size_t)n_rows * sizeof(float));
                moe__forward_scale(e, out[i] + row, n_rows);
            }
        }
    }
    moe__eval_barrier(e);
}

// Whether somebody wants to stop: asked by thread 0 in each layer, while the others go on. They
// look at the answer behind the next barrier, all at the same place, so that all stop or none.
MOE__PRIVATE void moe__forward_ask(moe__batch *batch) {
    for (int32_t i = 0; i < batch->n_jobs && !batch->stop; i++) {
        const moe_session *session = batch->jobs[i].session;
        if (!batch->jobs[i].status && session->should_stop &&
            session->should_stop(session->should_stop_user))
            batch->stop = 1;
    }
}

// One batch, by one of the threads that all do the same. Returns 0 if asked to stop. A layer is two
// halves of one shape: norm, a part that looks at other tokens or at experts, and a sum into the
// residual (or, with post norms, into a branch that is normed and then joins it).
MOE__PRIVATE int moe__forward(moe__eval *e) {
    const moe_model *model = e->model;
    moe__work *work = e->work;
    float *sum;
    moe__forward_begin(e);
    for (int il = 0; il < model->info.n_layer; il++) {
        const moe__layer *layer = &model->layers[il];
        const moe__matrix *next = il + 1 < model->info.n_layer ? layer[1].prefetch : &model->output;
        if (e->thread == 0) moe__forward_ask(e->batch);
        // residual += attn_output mixed, mixed = mixer(norm(residual))
        moe__eval_norm(e, work->residual, layer->attn_norm, MOE__IN_NORMED);
        moe__eval_fit(e, &layer->o);
        sum = moe__forward_branch(e, layer->attn_post_norm);
        moe__mixers[layer->mixer].forward(e, layer, il);
        if (e->batch->stop) return 0; // barriers have passed: all threads see the same
        moe__eval_quantize(e, MOE__IN_MIXED, e->n);
        if (e->n > 1) moe__eval_barrier(e);
        moe__eval_project_add(e, &layer->o, sum);
        moe__eval_barrier(e);
        moe__forward_join(e, layer->attn_post_norm);
        // residual += experts(norm(residual)), or the dense layer's network
        moe__eval_norm(e, work->residual, layer->ffn_norm, MOE__IN_NORMED);
        sum = moe__forward_branch(e, layer->ffn_post_norm);
        moe__forward_ffn(e, layer, sum, next);
        moe__forward_join(e, layer->ffn_post_norm);
    }
    return 1;
}

// The inputs of matrices for a batch of n rows. With one row, a thread has its own vectors where
// every thread makes them for itself, and otherwise its own int8 forms of shared floats: to
// quantize a few thousand values again in each thread is cheaper than to wait for somebody.
MOE__PRIVATE void moe__eval_inputs(moe__eval *e) {
    for (int i = 0; i < MOE__INPUTS; i++) {
        const moe__acts *own = &e->local->in[i];
        e->in[i] = e->work->in[i];
        for (int kind = 0; kind < MOE__ACT_KINDS && e->n == 1; kind++)
            if (own->data[kind]) e->in[i].data[kind] = own->data[kind];
    }
}

// All batches of a call: the job that moe__pool_run gives to every thread of the team. Thread 0
// fills the next batch between two barriers; the last barrier of a call is the pool's own.
MOE__PRIVATE void moe__eval_run(void *context, int thread, int n_threads) {
    moe__batch *batch = (moe__batch *)context;
    moe__eval e;
    memset(&e, 0, sizeof e);
    e.batch = batch;
    e.work = batch->work;
    e.model = batch->lead->model;
    e.kernels = batch->lead->kernels;
    e.local = &batch->work->locals[thread];
    e.thread = thread;
    e.n_threads = n_threads;
    for (;;) { // the first batch was made by the caller
        e.n = batch->n;
        moe__eval_inputs(&e);
        if (!moe__forward(&e)) return;
        moe__forward_logits(&e);
        if (!batch->more) return;
        moe__eval_barrier(&e);
        if (thread == 0) moe__batch_next(batch);
        moe__eval_barrier(&e);
    }
}

// ---- memory ---------------------------------------------------------------------------------

// Who owns what. A session has its caches, counts and logits, taken in moe_session_open and freed
// in moe_session_close. The buffers for a batch (moe__work), each thread's scratch among them,
// belong to the pool, which makes them as large as its most demanding session needs and frees them
// in moe_pool_close: its sessions take turns. Layouts are made twice by the same functions, first
// without memory to find out its size (moe__arena), so that the two cannot differ; sizes are
// checked for overflow there. Evaluating allocates nothing.

// What a thread has for itself: of one row the normed residual, and int8 forms of the rest. gate
// and up hold what a tile makes of all rows of a batch, n_batch * MOE__TILE_ROWS floats, and
// serve as room for any vector in between.
MOE__PRIVATE void moe__work_layout_local(const moe_session *session, moe__local *local,
                                         uint64_t mixing, moe__arena *arena) {
    const moe_model *model = session->model;
    const moe_model_info *info = &model->info;
    const int64_t n = session->info.n_batch, used = info->n_expert_used;
    int64_t longest = moe__max(info->n_embd, n * MOE__TILE_ROWS);
    for (int i = 0; i < MOE__INPUTS; i++) longest = moe__max(longest, model->widest[i]);
    local->scratch.pack = moe__arena_take(arena, 1, MOE__PACK_SIZE);
    local->scratch.gate = moe__take_floats(arena, 1, longest);
    local->scratch.up = moe__take_floats(arena, 1, longest);
    local->scratch.x = (const void **)moe__arena_take(arena, (uint64_t)n, sizeof(void *));
    local->scratch.x_up = (const void **)moe__arena_take(arena, (uint64_t)n, sizeof(void *));
    local->dispatch.entries =
        (moe__entry *)moe__arena_take(arena, (uint64_t)info->n_expert + 1, sizeof(moe__entry));
    local->dispatch.tokens =
        (int32_t *)moe__arena_take(arena, (uint64_t)(n * used), sizeof(int32_t));
    local->dispatch.weights = moe__take_floats(arena, n, used);
    for (int i = 0; i <= MOE__IN_DENSE; i++) {
        const unsigned kinds = model->kinds[i] & ~(unsigned)MOE__ACTS_FLOATS;
        moe__acts_take(&local->in[i], arena, i == MOE__IN_ROUTED ? used : 1, model->widest[i],
                       i == MOE__IN_NORMED ? kinds | MOE__ACTS_FLOATS : kinds);
    }
    local->rope = moe__take_floats(arena, 1, model->n_rope);
    local->router_logits = moe__take_floats(arena, 1, info->n_expert);
    local->experts = (int32_t *)moe__arena_take(arena, (uint64_t)used, sizeof(int32_t));
    local->expert_weights = moe__take_floats(arena, 1, used);
    local->mixing = (uint8_t *)moe__arena_take(arena, 1, mixing);
}

// Lays out what belongs to the session alone, but for the logits.
MOE__PRIVATE void moe__session_layout(moe_session *session, moe__arena *arena) {
    const moe_model *model = session->model;
    const moe_model_info *info = &model->info;
    const int32_t n = (int32_t)moe__max(session->info.n_threads, session->info.n_threads_batch);
    for (int il = 0; il < info->n_layer; il++) {
        const moe__layer *layer = &model->layers[il];
        const moe__cache_shape shape = moe__mixers[layer->mixer].cache(layer);
        const moe__cache cache =
            moe__cache_take(arena, &shape, session->info.kv_type, session->info.n_ctx);
        if (session->caches) session->caches[il] = cache;
    }
    session->info.kv_bytes = (size_t)arena->used;
    session->expert_counts = (uint64_t *)moe__arena_take(
        arena, (uint64_t)info->n_layer * (uint64_t)info->n_expert, sizeof(uint64_t));
    session->wait_seconds = (double *)moe__arena_take(arena, (uint64_t)n, sizeof(double));
}

// The most that a layer's mixer needs, of all threads and of one. Layers use the same memory one
// after the other: nothing that a mixer computes outlives its layer but what it caches.
MOE__PRIVATE void moe__work_mixing(const moe_session *session, moe__arena *common,
                                   moe__arena *own) {
    moe__acts in[MOE__INPUTS];
    moe__memory memory;
    for (int il = 0; il < session->model->info.n_layer; il++) {
        const moe__layer *layer = &session->model->layers[il];
        memset(&memory, 0, sizeof memory);
        memory.session = session;
        memory.in = in;
        moe__mixers[layer->mixer].layout(layer, &memory);
        common->used = common->used > memory.common.used ? common->used : memory.common.used;
        own->used = own->used > memory.own.used ? own->used : memory.own.used;
        common->overflow |= memory.common.overflow | memory.own.overflow;
    }
}

// Lays out the buffers for a batch: n_batch rows of everything that is shared by threads. With 512
// rows, 2048 values and 8 experts of 768, hidden vectors of routed experts are the largest, 12 MiB
// as floats.
MOE__PRIVATE void moe__work_layout(const moe_session *session, moe__work *work,
                                   moe__arena *arena) {
    const moe_model *model = session->model;
    const moe_model_info *info = &model->info;
    const int64_t n = session->info.n_batch, used = info->n_expert_used;
    const int n_threads =
        (int)moe__max(session->info.n_threads, session->info.n_threads_batch);
    moe__arena common, own;
    memset(&common, 0, sizeof common);
    memset(&own, 0, sizeof own);
    moe__work_mixing(session, &common, &own);
    arena->overflow |= common.overflow;
    work->rows = (moe__row *)moe__arena_take(arena, (uint64_t)n, sizeof(moe__row));
    work->spans = (moe__span *)moe__arena_take(arena, (uint64_t)n, sizeof(moe__span));
    work->residual = moe__take_floats(arena, n, info->n_embd);
    work->branch = moe__has(model, MOE__POST_NORMS) ? moe__take_floats(arena, n, info->n_embd)
                                                    : NULL;
    work->rope = moe__take_floats(arena, n, model->n_rope);
    for (int i = 0; i <= MOE__IN_DENSE; i++)
        moe__acts_take(&work->in[i], arena, i == MOE__IN_ROUTED ? n * used : n, model->widest[i],
                       model->kinds[i] | MOE__ACTS_FLOATS);
    work->router_logits = moe__take_floats(arena, n, info->n_expert);
    work->experts = (int32_t *)moe__arena_take(arena, (uint64_t)(n * used), sizeof(int32_t));
    work->expert_weights = moe__take_floats(arena, n, used);
    work->shared_weights = moe__take_floats(arena, 1, n);
    work->expert_out = moe__take_floats(arena, used + 1, info->n_embd);
    work->numbers = (int32_t *)moe__arena_take(arena, (uint64_t)n, sizeof(int32_t));
    work->scales = moe__take_floats(arena, 1, n);
    work->mixing = (uint8_t *)moe__arena_take(arena, 1, common.used);
    work->locals = (moe__local *)moe__arena_take(arena, (uint64_t)n_threads, sizeof(moe__local));
    for (int i = 0; i < n_threads; i++) {
        moe__local local;
        memset(&local, 0, sizeof local);
        moe__work_layout_local(session, &local, own.used, arena);
        if (arena->base) work->locals[i] = local;
    }
}

// ---- public ---------------------------------------------------------------------------------

// Fills session->info and the choices that go with it. n_batch is bounded by n_ctx, threads by the
// pool's: buffers are taken for these.
MOE__PRIVATE moe_status moe__session_configure(moe_session *session, const moe_model *model,
                                               const moe_session_options *options,
                                               moe_error *error) {
    moe_session_options zero;
    memset(&zero, 0, sizeof zero);
    const moe_session_options *o = options ? options : &zero;
    moe_session_info *info = &session->info;
    if (o->n_ctx < 0 || o->n_batch < 0 || o->n_threads < 0 || o->n_threads_batch < 0 ||
        o->n_threads > MOE_MAX_THREADS || o->n_threads_batch > MOE_MAX_THREADS)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "options",
                         "n_ctx, n_batch or a thread count is out of range");
    if ((unsigned)o->kv_type > MOE_KV_F32)
        return moe__fail(error, MOE_ERROR_UNSUPPORTED, "kv_type",
                         "cache type %d is not supported: F16, Q8_0 and F32 are",
                         (int)o->kv_type);
    for (int il = 0; il < model->info.n_layer && o->kv_type == MOE_KV_Q8_0; il++) {
        const moe__layer *layer = &model->layers[il];
        const moe__cache_shape shape = moe__mixers[layer->mixer].cache(layer);
        if (shape.k % 32 || shape.v % 32 || shape.part % 32)
            return moe__fail(error, MOE_ERROR_UNSUPPORTED, "kv_type",
                             "a Q8_0 cache needs widths that are multiples of 32: here %d and %d",
                             (int)(shape.part ? shape.part : shape.k),
                             (int)(shape.part ? shape.k - shape.part : shape.v));
    }
    session->schedule = moe__schedule_find(o->schedule);
    if (!session->schedule)
        return moe__fail(error, MOE_ERROR_UNSUPPORTED, "schedule",
                         "expert schedule %d is unknown: 1 to 3 are known",
                         (int)o->schedule);
    session->model = model;
    session->pool = o->pool;
    session->keep_all_logits = o->keep_all_logits > 0;
    session->pin = o->pin ? o->pin : model->memory.numa == MOE_NUMA_OWNER ? MOE_ON : MOE_OFF;
    session->should_stop = o->should_stop;
    session->should_stop_user = o->should_stop_user;
    session->kernels = moe__kernels_get(o->isa);
    info->isa = session->kernels->isa;
    info->schedule = session->schedule->schedule;
    info->kv_type = o->kv_type;
    info->n_ctx = o->n_ctx ? o->n_ctx : (int32_t)moe__min(model->info.n_ctx_train, 4096);
    info->n_batch = (int32_t)moe__min(o->n_batch ? o->n_batch : 512, info->n_ctx);
    int most = o->pool ? o->pool->n_threads : MOE_MAX_THREADS;
    int n = o->n_threads ? o->n_threads : o->pool ? most : moe__pool_default_threads();
    info->n_threads = (int32_t)moe__min(n, most);
    info->n_threads_batch =
        (int32_t)moe__min(o->n_threads_batch ? o->n_threads_batch : info->n_threads, most);
    return MOE_OK;
}

// Buffers begin at a multiple of this: large ones at a huge page.
MOE__INLINE uint64_t moe__session_align(uint64_t size) {
    return size < 8 * (uint64_t)MOE__PAGES_HUGE ? 64 : MOE__PAGES_HUGE;
}

// Bytes of what belongs to the session, logits apart, and of the buffers for a batch. 0 on
// overflow. Fills info.kv_bytes and info.work_bytes. The first is the cache, which alone grows with
// n_ctx (and the logits, if all are kept); the second grows with n_batch and threads.
MOE__PRIVATE uint64_t moe__session_size(moe_session *session, uint64_t *logits, uint64_t *work) {
    moe__arena arena, buffers;
    const uint64_t rows = session->keep_all_logits ? (uint64_t)session->info.n_ctx : 1;
    memset(&arena, 0, sizeof arena);
    memset(&buffers, 0, sizeof buffers);
    moe__session_layout(session, &arena);
    moe__work_layout(session, &session->work, &buffers);
    *work = buffers.used;
    if (arena.overflow || buffers.overflow ||
        !moe__size_mul(rows * sizeof(float), (uint64_t)session->model->info.n_vocab, logits) ||
        *logits > SIZE_MAX / 4 || *work > SIZE_MAX / 4)
        return 0;
    session->info.work_bytes =
        (size_t)(arena.used - session->info.kv_bytes + *logits + moe__session_align(arena.used) +
                 *work + moe__session_align(*work));
    return arena.used;
}

// The threads that will use memory touch it first.
typedef struct moe__touch {
    uint8_t *memory;
    size_t size;
} moe__touch;
MOE__PRIVATE void moe__touch_run(void *context, int thread, int n_threads) {
    const moe__touch *touch = (const moe__touch *)context;
    int64_t begin, end;
    moe__pool_range((int64_t)touch->size, MOE__PAGES_HUGE, thread, n_threads, &begin, &end);
    memset(touch->memory + begin, 0, (size_t)(end - begin));
}

// Room for the buffers of a session, which sessions of a pool share. Every thread of the pool
// touches a part of it first, so that on machines with several memory nodes it is spread over
// them. 0: there is no memory.
MOE__PRIVATE int moe__pool_reserve(moe_pool *pool, uint64_t size) {
    const uint64_t align = moe__session_align(size);
    moe__touch touch;
    int ok = 1;
    moe__pool_hold(pool);
    pool->work_owner = NULL; // it may have been closed, and be opened at the same address
    if (size > pool->work_size) {
        void *memory = moe__alloc_unset(&pool->allocator, (size_t)(size + align));
        ok = memory != NULL;
        if (ok) {
            moe__free(&pool->allocator, pool->work_memory);
            pool->work_memory = memory;
            pool->work = (uint8_t *)(((uintptr_t)memory + align - 1) & ~(align - 1));
            pool->work_size = (size_t)size;
            moe__pages_advise(pool->work, size, MOE__MADV_HUGEPAGE);
            touch.memory = pool->work, touch.size = pool->work_size;
            moe__pool_run_held(pool, pool->n_threads, moe__touch_run, &touch, NULL);
        }
    }
    moe__pool_release(pool);
    return ok;
}

// Lays out the buffers in the pool's memory, unless nobody else has since: sessions of a pool may
// be of different models, whose buffers have other shapes. The pool is held.
MOE__PRIVATE void moe__session_place(moe_session *session) {
    moe__arena arena;
    moe_pool *pool = session->pool;
    if (pool->work_owner == session) return;
    memset(&arena, 0, sizeof arena);
    arena.base = pool->work;
    moe__work_layout(session, &session->work, &arena);
    pool->work_owner = session;
}

// The cache is the begin of `buffers`; huge pages are asked for before anything touches it. It
// is not cleared: what nobody stores in it takes no memory. Nor are rows of logits.
MOE__PRIVATE int moe__session_take(moe_session *session, uint64_t size, uint64_t logits) {
    const uint64_t align = moe__session_align(size);
    moe__arena arena;
    memset(&arena, 0, sizeof arena);
    session->caches = (moe__cache *)moe__alloc(
        &session->allocator, (size_t)session->model->info.n_layer * sizeof *session->caches);
    session->memory = moe__alloc_unset(&session->allocator, (size_t)(size + align));
    session->logits = (float *)moe__alloc_unset(&session->allocator, (size_t)logits);
    if (!session->caches || !session->memory || !session->logits) return 0;
    session->buffers = (uint8_t *)(((uintptr_t)session->memory + align - 1) & ~(align - 1));
    session->n_bytes = (size_t)size;
    moe__pages_advise(session->buffers, size, MOE__MADV_HUGEPAGE);
    arena.base = session->buffers;
    moe__session_layout(session, &arena);
    memset(session->buffers + session->info.kv_bytes, 0, session->n_bytes - session->info.kv_bytes);
    return 1;
}

// In the order: what is asked for, how much memory that is, the memory, the threads. Whatever
// fails, moe_session_close frees what there is by then.
MOE_API moe_session *moe_session_open(const moe_model *model, const moe_session_options *options,
                                      moe_error *error) {
    moe_session draft, *session;
    uint64_t logits = 0, work = 0;
    if (!model) {
        moe__fail(error, MOE_ERROR_ARGUMENT, "model", "model is NULL");
        return NULL;
    }
    memset(&draft, 0, sizeof draft);
    if (moe__session_configure(&draft, model, options, error)) return NULL;
    const uint64_t size = moe__session_size(&draft, &logits, &work);
    session = size ? (moe_session *)moe__alloc(&model->allocator, sizeof *session) : NULL;
    if (!session) {
        moe__fail(error, MOE_ERROR_MEMORY, "session", "a session of %d tokens does not fit",
                  draft.info.n_ctx);
        return NULL;
    }
    *session = draft;
    session->allocator = model->allocator;
    if (!moe__session_take(session, size, logits)) {
        moe__fail(error, MOE_ERROR_MEMORY, "session", "no memory for a session of %d tokens",
                  draft.info.n_ctx);
        moe_session_close(session);
        return NULL;
    }
    if (!session->pool) {
        moe_pool_options pool_options;
        memset(&pool_options, 0, sizeof pool_options);
        pool_options.allocator = session->allocator;
        pool_options.n_threads =
            (int32_t)moe__max(session->info.n_threads, session->info.n_threads_batch);
        pool_options.pin = session->pin;
        session->pool = session->own_pool = moe_pool_open(&pool_options, error);
        if (!session->pool) {
            moe_session_close(session);
            return NULL;
        }
    }
    if (moe__pool_is_held(session->pool)) {
        moe__fail(error, MOE_ERROR_ARGUMENT, "pool",
                  "a callback cannot open a session on the pool that calls it");
        moe_session_close(session);
        return NULL;
    }
    if (!moe__pool_reserve(session->pool, work)) {
        moe__fail(error, MOE_ERROR_MEMORY, "session", "no memory for batches of %d tokens",
                  draft.info.n_batch);
        moe_session_close(session);
        return NULL;
    }
    return session;
}

MOE_API void moe_session_close(moe_session *session) {
    if (!session) return;
    moe_allocator allocator = session->allocator;
    moe_pool_close(session->own_pool);
    moe__free(&allocator, session->logits);
    moe__free(&allocator, session->memory);
    moe__free(&allocator, session->caches);
    moe__free(&allocator, session);
}

MOE_API moe_status moe_session_estimate(const moe_model *model, const moe_session_options *options,
                                        moe_session_info *info, moe_error *error) {
    moe_session draft;
    uint64_t logits = 0, work = 0;
    if (!model || !info)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "model", "model or info is NULL");
    memset(&draft, 0, sizeof draft);
    moe_status status = moe__session_configure(&draft, model, options, error);
    if (status) return status;
    if (!moe__session_size(&draft, &logits, &work))
        return moe__fail(error, MOE_ERROR_MEMORY, "session", "a session of %d tokens does not fit",
                         draft.info.n_ctx);
    *info = draft.info;
    return MOE_OK;
}

MOE_API const moe_model *moe_session_model(const moe_session *session) {
    return session ? session->model : NULL;
}
MOE_API const moe_session_info *moe_session_get_info(const moe_session *session) {
    return session ? &session->info : NULL;
}
MOE_API uint64_t moe_session_huge_bytes(const moe_session *session) {
    if (!session) return 0;
    return moe__pages_huge("/proc/self/smaps", session->buffers, session->n_bytes) +
           moe__pages_huge("/proc/self/smaps", session->pool->work, session->pool->work_size);
}
MOE_API int32_t moe_session_length(const moe_session *session) {
    return session ? session->length : 0;
}

// Whether a job can be evaluated beside those before it. All is checked before anything is
// computed: an error leaves every session as it was.
MOE__PRIVATE moe_status moe__job_check(const moe_job *job, const moe_session *lead,
                                       moe_error *error) {
    const moe_session *session = job->session;
    if (!session || !job->tokens || job->n_tokens < 1)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "tokens",
                         "a session and at least one token are needed");
    if (moe__pool_is_held(session->pool))
        return moe__fail(error, MOE_ERROR_ARGUMENT, "should_stop",
                         "a callback cannot evaluate with the pool that calls it");
    if (session->in_jobs)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "session", "a session has two jobs");
    if (session->model != lead->model || session->pool != lead->pool ||
        session->kernels != lead->kernels)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "session",
                         "sessions evaluated together have one model, one pool and one isa");
    for (int32_t i = 0; i < job->n_tokens; i++)
        if (job->tokens[i] < 0 || job->tokens[i] >= session->model->info.n_vocab)
            return moe__fail(error, MOE_ERROR_ARGUMENT, "tokens",
                             "token %d at position %d is not within 0..%d", (int)job->tokens[i],
                             (int)i, (int)session->model->info.n_vocab - 1);
    if (job->n_tokens > session->info.n_ctx - session->length)
        return moe__fail(error, MOE_ERROR_CONTEXT_FULL, "n_ctx",
                         "%d tokens do not fit behind %d of %d", (int)job->n_tokens,
                         (int)session->length, (int)session->info.n_ctx);
    return MOE_OK;
}

// Runs the jobs whose status is MOE_OK, n_tokens in all. The pool is held meanwhile: other threads
// of the program that evaluate sessions of the same pool wait for their turn.
MOE__PRIVATE int moe__jobs_run(moe__batch *batch, int64_t n_tokens) {
    moe_session *lead = batch->lead;
    moe_session_stats *stats = &lead->stats;
    const int32_t n = n_tokens == 1 ? lead->info.n_threads : lead->info.n_threads_batch;
    memset(stats, 0, sizeof *stats);
    stats->thread_wait_seconds = lead->wait_seconds;
    stats->n_threads = n;
    moe__pool_hold(lead->pool);
    moe__session_place(lead);
    batch->work = &lead->work;
    moe__batch_next(batch);
    moe__pool_nodes(lead->pool, n, &batch->nodes);
    stats->n_nodes = batch->nodes.n;
    stats->eval_seconds =
        moe__pool_run_held(lead->pool, n, moe__eval_run, batch, lead->wait_seconds);
    moe__pool_release(lead->pool);
    for (int32_t i = 0; i < n; i++) stats->wait_seconds += lead->wait_seconds[i];
    return !batch->stop;
}

// First all jobs are checked, then those that are right are evaluated together, then lengths grow.
// Until then nothing of a session has changed that anybody can see: rows of the cache behind its
// length do not count. in_jobs finds a session that is in the list twice.
MOE_API moe_status moe_session_eval_many(moe_job *jobs, int32_t n_jobs, moe_error *error) {
    moe__batch batch;
    moe_status first = MOE_OK;
    int64_t n_tokens = 0;
    memset(&batch, 0, sizeof batch);
    if (!jobs || n_jobs < 1)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "jobs", "at least one job is needed");
    for (int32_t i = 0; i < n_jobs; i++) {
        const moe_session *lead = batch.lead ? batch.lead : jobs[i].session;
        jobs[i].status = moe__job_check(&jobs[i], lead, first ? NULL : error);
        if (jobs[i].status) {
            first = first ? first : jobs[i].status;
            continue;
        }
        batch.lead = batch.lead ? batch.lead : jobs[i].session;
        jobs[i].session->in_jobs = 1;
        n_tokens += jobs[i].n_tokens;
    }
    batch.jobs = jobs;
    batch.n_jobs = n_jobs;
    const int done = batch.lead && moe__jobs_run(&batch, n_tokens);
    for (int32_t i = 0; i < n_jobs; i++) {
        moe_session *session = jobs[i].session;
        if (jobs[i].status) continue;
        session->in_jobs = 0;
        if (!done) {
            jobs[i].status = MOE_ERROR_CANCELLED;
            continue;
        }
        session->length += jobs[i].n_tokens;
        session->n_last = jobs[i].n_tokens;
    }
    if (batch.lead && !done && !first)
        return moe__fail(error, MOE_ERROR_CANCELLED, "should_stop", "the evaluation was cancelled");
    if (n_tokens == 1)
        moe__paging_token(batch.lead->model, batch.lead->stats.eval_seconds, batch.lead->pool);
    return first;
}

MOE_API moe_status moe_session_eval(moe_session *session, const int32_t *tokens, int32_t n_tokens,
                                    moe_error *error) {
    moe_job job;
    job.session = session;
    job.tokens = tokens;
    job.n_tokens = n_tokens;
    return moe_session_eval_many(&job, 1, error);
}

// Kept logits stand at their positions ([n_ctx][n_vocab]), so that those of the last eval end where
// the context does; otherwise there is one row.
MOE_API const float *moe_session_logits(const moe_session *session, int32_t i) {
    if (!session || !session->n_last) return NULL;
    if (i == -1) i = session->n_last - 1;
    if (i < 0 || i >= session->n_last) return NULL;
    if (session->keep_all_logits)
        return session->logits +
               (int64_t)(session->length - session->n_last + i) * session->model->info.n_vocab;
    return i == session->n_last - 1 ? session->logits : NULL;
}

MOE_API const moe_session_stats *moe_session_get_stats(const moe_session *session) {
    return session ? &session->stats : NULL;
}

MOE_API const uint64_t *moe_session_expert_counts(const moe_session *session, int32_t layer) {
    if (!session || layer < 0 || layer >= session->model->info.n_layer ||
        !session->model->layers[layer].is_moe)
        return NULL;
    return session->expert_counts + (int64_t)layer * session->model->info.n_expert;
}

// Every layer has a say: a mixer that remembers a state and not positions can only go back to
// where it kept one.
MOE_API moe_status moe_session_rewind(moe_session *session, int32_t length, moe_error *error) {
    if (session && session->in_jobs)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "should_stop",
                         "a callback cannot rewind a session that is being evaluated");
    if (!session || length < 0 || length > session->length)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "length", "cannot rewind to %d of %d tokens",
                         (int)length, session ? (int)session->length : 0);
    for (int il = 0; il < session->model->info.n_layer; il++) {
        const moe__mixer *mixer = &moe__mixers[session->model->layers[il].mixer];
        length = (int32_t)moe__min(length, mixer->rewind(session, il, length));
    }
    if (length < session->length) session->n_last = 0;
    session->length = length;
    return MOE_OK;
}

// ==============================================================================================
// >>sample
//
// From logits to text: the sampler, the text stream and the loop that drives a session.
//
//     logits -> sampler -> token -> bytes -> whole characters -> held back -> on_text
//
// The sampler looks once at all logits, for the largest of each block of them, its peak. Then it
// reads only blocks that can matter: greedy one, top-k at most k, top-p and min-p those whose peak
// is not below their limit. The stream gives out whole characters that no stop string can begin
// in. Neither allocates anything after it was opened.
// ==============================================================================================

enum {
    MOE__MAX_RECENT = 1 << 24, // tokens that the repetition penalty can look back
    MOE__FIRST_SELECTION = 64, // candidates sorted at first when top_p asks for some of a list
    MOE__TOP_P_SLOTS = 4096,   // of logits, MOE__TOP_P_WIDTH wide, by which it finds its limit
    MOE__MAX_STOP = 512,       // bytes of a stop string
    MOE__STREAM_SIZE = 2048,   // bytes of text that wait; more than MOE__MAX_STOP
    MOE__TOKEN_TEXT = 8192     // bytes of one token's text; what lies behind is left out
};
#define MOE__TOP_P_WIDTH (1.0f / 128)

// ---- candidates ------------------------------------------------------------------------------

typedef struct moe__candidate {
    float logit;
    int32_t id;
} moe__candidate;

// Likelier first, the lower id among equals: a total order, so that results do not depend on how
// candidates are sorted.
MOE__INLINE int moe__candidate_before(moe__candidate a, moe__candidate b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The last in order on top.
#define MOE__CANDIDATE_ABOVE(a, b) moe__candidate_before(b, a)
MOE__HEAP(moe__candidates, moe__candidate, MOE__CANDIDATE_ABOVE)

// Reorders n candidates so that the first k, 1 <= k <= n, are the likeliest, in order.
MOE__PRIVATE void moe__candidates_select(moe__candidate *c, int32_t n, int32_t k) {
    moe__candidates_build(c, (size_t)k);
    for (int32_t i = k; i < n; i++) {
        if (!moe__candidate_before(c[i], c[0])) continue;
        moe__candidate out = c[0];
        c[0] = c[i];
        c[i] = out;
        moe__candidates_sift(c, 0, (size_t)k);
    }
    moe__candidates_sort(c, (size_t)k);
}

// The first k in order of those that were added: as they came until there are more of them, then
// a heap.
typedef struct moe__top {
    moe__candidate *at;
    int32_t k, n; // n: how many were added
} moe__top;

MOE__INLINE void moe__top_add(moe__top *top, float logit, int32_t id) {
    const moe__candidate c = {logit, id};
    if (top->n < top->k) {
        top->at[top->n++] = c;
        return;
    }
    if (top->n++ == top->k) moe__candidates_build(top->at, (size_t)top->k);
    if (!moe__candidate_before(c, top->at[0])) return;
    top->at[0] = c;
    moe__candidates_sift(top->at, 0, (size_t)top->k);
}

// Sum of exp(logit - max) over n candidates.
MOE__PRIVATE double moe__candidates_mass(const moe__candidate *c, int32_t n, double max) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += exp((double)c[i].logit - max);
    return sum;
}

// Top-p: how many of n candidates, sorted up to `sorted`, are needed for the sum of exp(logit -
// max) to be `needed`; sorts more of them when these do not suffice.
MOE__PRIVATE int32_t moe__candidates_top_p(moe__candidate *c, int32_t n, int32_t sorted,
                                           double max, double needed) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) {
        if (i == sorted) { // the first i stay where they are
            sorted = (int32_t)moe__min(n, moe__max(MOE__FIRST_SELECTION, (int64_t)sorted * 8));
            moe__candidates_select(c + i, n - i, sorted - i);
        }
        sum += exp((double)c[i].logit - max);
        if (sum >= needed) return i + 1;
    }
    return n;
}

// Min-p: the lowest logit that is at least p times as likely as the largest; if p is 1 or more,
// the largest itself.
MOE__PRIVATE float moe__candidates_limit(float max, float p) {
    if (p >= 1) return max;
    const double limit = (double)max + log((double)p);
    const float nearest = (float)limit;
    return (double)nearest < limit ? nextafterf(nearest, INFINITY) : nearest;
}

MOE__PRIVATE int32_t moe__candidates_min_p(moe__candidate *c, int32_t n, float limit) {
    int32_t kept = 0;
    for (int32_t i = 0; i < n; i++)
        if (c[i].logit >= limit) c[kept++] = c[i];
    return kept;
}

// ---- logits ----------------------------------------------------------------------------------

typedef struct moe__recent {
    int32_t id, count; // a token, how many times it is among the recent ones
} moe__recent;

// One row, read in blocks of MOE__PEAK logits.
typedef struct moe__logits {
    const moe__kernels *kernels;
    const float *row;
    int32_t n;
    const moe__recent *recent; // by id, all below n: tokens to penalize
    int32_t n_recent, at;      // at: where the last block began among them
    float penalty;
} moe__logits;

MOE__INLINE int32_t moe__logits_blocks(int32_t n) {
    return (int32_t)(((int64_t)n + MOE__PEAK - 1) / MOE__PEAK);
}

// Of a token that was there lately; once, however often it was. Finite values stay finite.
MOE__PRIVATE float moe__logits_penalize(float logit, float penalty) {
    float result = logit > 0 ? logit / penalty : logit * penalty;
    if (result > FLT_MAX) return FLT_MAX;
    return logit > -INFINITY && result < -FLT_MAX ? -FLT_MAX : result;
}

// A block as it counts: with penalties, the largest float for infinity, and -inf behind the end.
// What is NaN or -inf cannot be chosen. peak: of the block, with or without penalties.
MOE__PRIVATE void moe__logits_load(moe__logits *l, int32_t block, float peak, float *out) {
    const int32_t start = block * MOE__PEAK, n = (int32_t)moe__min(l->n - start, MOE__PEAK);
    memcpy(out, l->row + start, (size_t)n * sizeof *out);
    for (int32_t i = n; i < MOE__PEAK; i++) out[i] = -INFINITY;
    for (int32_t i = 0; peak >= FLT_MAX && i < n; i++)
        if (out[i] > FLT_MAX) out[i] = FLT_MAX;
    while (l->at > 0 && l->recent[l->at - 1].id >= start) l->at--;
    while (l->at < l->n_recent && l->recent[l->at].id < start) l->at++;
    for (int32_t i = l->at; i < l->n_recent && l->recent[i].id - start < n; i++) {
        const int32_t id = l->recent[i].id;
        out[id - start] = moe__logits_penalize(l->row[id], l->penalty);
    }
}

// The largest logits of n blocks from `first` on, -inf where there is none; returns the largest
// of these.
MOE__PRIVATE float moe__logits_peaks(moe__logits *l, int32_t first, int32_t n, float *peaks) {
    const int32_t start = first * MOE__PEAK;
    const int32_t end = (int32_t)moe__min(l->n, start + (int64_t)n * MOE__PEAK);
    float block[MOE__PEAK], max = -INFINITY;
    l->kernels->peaks(l->row + start, end - start, peaks);
    while (l->at > 0 && l->recent[l->at - 1].id >= start) l->at--;
    for (int32_t i = l->at, last = -1; i < l->n_recent && l->recent[i].id < end; i++) {
        const int32_t b = l->recent[i].id / MOE__PEAK - first;
        if (b <= last) continue; // once per block, and none before the first
        moe__logits_load(l, first + b, peaks[b], block);
        l->kernels->peaks(block, MOE__PEAK, peaks + b);
        last = b;
    }
    for (int32_t b = 0; b < n; b++) {
        if (peaks[b] > FLT_MAX) peaks[b] = FLT_MAX;
        if (peaks[b] > max) max = peaks[b];
    }
    return max;
}

// Whether there is a finite logit; max is the largest one.
MOE__PRIVATE int moe__logits_any(const moe__logits *l, float max) {
    if (max < FLT_MAX) return max > -INFINITY;
    for (int32_t i = 0; i < l->n; i++)
        if (l->row[i] > -INFINITY && l->row[i] <= FLT_MAX) return 1;
    return 0;
}

// The token with the largest logit, the first of equals; 0 if no logit is finite.
MOE__PRIVATE int32_t moe__logits_greedy(moe__logits *l) {
    enum { STEP = 64 };
    const int32_t n_blocks = moe__logits_blocks(l->n);
    float peaks[STEP], max = -INFINITY, logit[MOE__PEAK];
    int32_t best = 0, at = 0;
    for (int32_t first = 0; first < n_blocks; first += STEP) {
        const int32_t n = (int32_t)moe__min(n_blocks - first, STEP);
        if (!(moe__logits_peaks(l, first, n, peaks) > max)) continue;
        for (int32_t b = 0; b < n; b++) {
            if (!(peaks[b] > max)) continue;
            max = peaks[b];
            best = first + b;
        }
    }
    if (!moe__logits_any(l, max)) return 0;
    moe__logits_load(l, best, max, logit);
    while (logit[at] != max) at++;
    return best * MOE__PEAK + at;
}

// ---- sampler ---------------------------------------------------------------------------------

struct moe_sampler {
    moe_sampler_options options;
    moe_allocator allocator;
    int32_t n_vocab, n_valid;
    uint64_t random;
    const moe__kernels *kernels;
    int32_t *recent; // ring of the last max_recent tokens, n_recent of them filled
    int32_t max_recent, n_recent, next_recent;
    moe__recent *penalized; // the same by id, those that there are logits of
    int32_t n_penalized;
    float *peaks;               // per block; not if greedy
    moe__candidate *candidates; // top_k at most; n_valid if top_p stands alone
    double *sums, *slots;       // weights per block, if there is no top_k; top-p's
    moe__candidate last;        // the least likely that the filters keep, of one choice
    float above;                // the float above last.logit
};

// In [0, 1), with all 53 bits of a double.
MOE__PRIVATE double moe__sampler_random(moe_sampler *sampler) {
    return (double)(moe__splitmix64(&sampler->random) >> 11) * (1.0 / 9007199254740992.0);
}

MOE__PRIVATE moe_status moe__sampler_check(const moe_sampler_options *o, int32_t n_vocab,
                                           int32_t n_valid, moe_error *error) {
    const char *name = NULL; // comparisons with NaN are false
    if (!(o->repeat_penalty >= 0 && o->repeat_penalty <= FLT_MAX)) name = "repeat_penalty";
    if (!(o->min_p >= 0 && o->min_p <= FLT_MAX)) name = "min_p";
    if (!(o->top_p >= 0 && o->top_p <= FLT_MAX)) name = "top_p";
    if (!(o->temperature >= -FLT_MAX && o->temperature <= FLT_MAX)) name = "temperature";
    if (name) return moe__fail(error, MOE_ERROR_ARGUMENT, name, "%s is out of range", name);
    if (o->repeat_last_n < MOE_OFF || o->repeat_last_n > MOE__MAX_RECENT)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "repeat_last_n",
                         "repeat_last_n is not between %d and %d", (int)MOE_OFF,
                         (int)MOE__MAX_RECENT);
    if (n_vocab < 1)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "n_vocab", "n_vocab is not positive");
    if (n_valid < 1 || n_valid > n_vocab)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "n_valid", "n_valid is not in 1..n_vocab");
    return MOE_OK;
}

MOE__INLINE int moe__sampler_has_top_p(const moe_sampler_options *o) {
    return o->top_p > 0 && o->top_p < 1;
}

// n elements, or NULL; *ok becomes 0 if there is no memory.
MOE__PRIVATE void *moe__sampler_array(const moe_sampler *sampler, int64_t n, size_t size, int *ok) {
    if (n == 0) return NULL;
    void *memory = moe__alloc(&sampler->allocator, (size_t)n * size);
    if (!memory) *ok = 0;
    return memory;
}

// What the options need; only top-p without top-k, or a large top-k, takes a list as long as the
// vocabulary.
MOE__PRIVATE int moe__sampler_alloc(moe_sampler *sampler) {
    const moe_sampler_options *o = &sampler->options;
    const int32_t n = sampler->n_valid;
    const int draws = o->temperature > 0, list = draws && o->top_k > 0, all = draws && !list;
    const int64_t n_blocks = moe__logits_blocks(n), top_p = all && moe__sampler_has_top_p(o);
    int ok = 1;
    sampler->recent = (int32_t *)moe__sampler_array(sampler, sampler->max_recent,
                                                    sizeof *sampler->recent, &ok);
    sampler->penalized = (moe__recent *)moe__sampler_array(
        sampler, moe__min(n, sampler->max_recent), sizeof *sampler->penalized, &ok);
    sampler->peaks = (float *)moe__sampler_array(sampler, draws ? n_blocks : 0,
                                                 sizeof *sampler->peaks, &ok);
    sampler->candidates = (moe__candidate *)moe__sampler_array(
        sampler, list ? moe__min(n, o->top_k) : top_p ? n : 0, sizeof *sampler->candidates, &ok);
    sampler->sums = (double *)moe__sampler_array(sampler, all ? n_blocks : 0,
                                                 sizeof *sampler->sums, &ok);
    sampler->slots = (double *)moe__sampler_array(sampler, top_p ? MOE__TOP_P_SLOTS + 1 : 0,
                                                  sizeof *sampler->slots, &ok);
    return ok;
}

MOE_API moe_sampler *moe_sampler_open(const moe_sampler_options *options, int32_t n_vocab,
                                      int32_t n_valid, moe_error *error) {
    moe_sampler_options o;
    moe_allocator allocator;
    memset(&o, 0, sizeof o);
    if (options) o = *options;
    if (moe__sampler_check(&o, n_vocab, n_valid, error) != MOE_OK ||
        moe__allocator_init(&allocator, &o.allocator, error) != MOE_OK)
        return NULL;
    moe_sampler *sampler = (moe_sampler *)moe__alloc(&allocator, sizeof *sampler);
    if (sampler) {
        int penalty = o.repeat_penalty > 0 && o.repeat_penalty != 1 && o.repeat_last_n != MOE_OFF;
        sampler->options = o;
        sampler->allocator = allocator;
        sampler->n_vocab = n_vocab;
        sampler->n_valid = n_valid;
        sampler->random = o.seed;
        sampler->kernels = moe__kernels_get(MOE_ISA_BEST);
        sampler->max_recent = !penalty ? 0 : o.repeat_last_n ? o.repeat_last_n : 64;
        if (moe__sampler_alloc(sampler)) return sampler;
        moe_sampler_close(sampler);
    }
    moe__fail(error, MOE_ERROR_MEMORY, "", "out of memory for a sampler");
    return NULL;
}

MOE_API void moe_sampler_close(moe_sampler *sampler) {
    if (!sampler) return;
    moe_allocator allocator = sampler->allocator;
    moe__free(&allocator, sampler->recent);
    moe__free(&allocator, sampler->penalized);
    moe__free(&allocator, sampler->peaks);
    moe__free(&allocator, sampler->candidates);
    moe__free(&allocator, sampler->sums);
    moe__free(&allocator, sampler->slots);
    moe__free(&allocator, sampler);
}

// Counts a token among the penalized ones, or takes it away again.
MOE__PRIVATE void moe__sampler_count(moe_sampler *sampler, int32_t id, int32_t change) {
    moe__recent *p = sampler->penalized;
    int32_t at = 0, end = sampler->n_penalized;
    if (id < 0 || id >= sampler->n_valid) return;
    while (at < end) {
        int32_t middle = at + (end - at) / 2;
        if (p[middle].id < id) at = middle + 1;
        else end = middle;
    }
    const size_t behind = (size_t)(sampler->n_penalized - at) * sizeof *p;
    if (at == sampler->n_penalized || p[at].id != id) {
        memmove(p + at + 1, p + at, behind);
        p[at].id = id;
        p[at].count = 0;
        sampler->n_penalized++;
    }
    p[at].count += change;
    if (p[at].count > 0) return;
    sampler->n_penalized--;
    memmove(p + at, p + at + 1, (size_t)(sampler->n_penalized - at) * sizeof *p);
}

MOE_API void moe_sampler_accept(moe_sampler *sampler, int32_t token) {
    if (!sampler || sampler->max_recent == 0) return;
    int32_t *place = sampler->recent + sampler->next_recent;
    if (sampler->n_recent == sampler->max_recent) moe__sampler_count(sampler, *place, -1);
    else sampler->n_recent++;
    *place = token;
    moe__sampler_count(sampler, token, 1);
    sampler->next_recent = (sampler->next_recent + 1) % sampler->max_recent;
}

// ---- choosing from a list --------------------------------------------------------------------

// Top-k. Take the k largest peaks of blocks: they are k candidates, so the k-th likeliest is not
// behind the least of these peaks. A block whose own peak is behind that holds none of the k: it
// is left out unread.

// The k likeliest become the list, in order. If there are no more than k, all of them by id, and
// *sorted stays 0. Returns how many there are.
MOE__PRIVATE int32_t moe__sampler_top(moe_sampler *sampler, moe__logits *l, int32_t k,
                                      int32_t *sorted) {
    const int32_t n_blocks = moe__logits_blocks(l->n);
    moe__candidate least = {-FLT_MAX, INT32_MAX};
    moe__top top = {sampler->candidates, k, 0};
    float logit[MOE__PEAK];
    for (int32_t b = 0; n_blocks > k && b < n_blocks; b++)
        if (sampler->peaks[b] > -INFINITY) moe__top_add(&top, sampler->peaks[b], b);
    const int left_out = top.n > k;
    if (left_out) least = top.at[0];
    top.n = 0;
    for (int32_t b = 0; b < n_blocks; b++) {
        const moe__candidate peak = {sampler->peaks[b], b};
        if (moe__candidate_before(least, peak)) continue;
        moe__logits_load(l, b, peak.logit, logit);
        for (int32_t i = 0; i < MOE__PEAK; i++)
            if (logit[i] >= least.logit) moe__top_add(&top, logit[i], b * MOE__PEAK + i);
    }
    if (top.n <= k && !left_out) return top.n;
    if (top.n <= k) moe__candidates_build(top.at, (size_t)k);
    moe__candidates_sort(top.at, (size_t)k);
    return *sorted = k;
}

// Draws one of n candidates by exp(logit / temperature).
MOE__PRIVATE int32_t moe__sampler_draw(moe_sampler *sampler, int32_t n, double max) {
    const moe__candidate *c = sampler->candidates;
    double temperature = sampler->options.temperature, total = 0, sum = 0;
    for (int32_t i = 0; i < n; i++) total += exp(((double)c[i].logit - max) / temperature);
    double point = moe__sampler_random(sampler) * total;
    int32_t chosen = c[0].id;
    for (int32_t i = 0; i < n; i++) {
        double weight = exp(((double)c[i].logit - max) / temperature);
        if (weight > 0) chosen = c[i].id; // the last one, if rounding leaves the sum too small
        sum += weight;
        if (sum > point) break;
    }
    return chosen;
}

// What top-p left of the list: min-p and the draw.
MOE__PRIVATE int32_t moe__sampler_finish(moe_sampler *sampler, int32_t n, float max) {
    const float p = sampler->options.min_p;
    moe__candidate *c = sampler->candidates;
    if (p > 0) n = moe__candidates_min_p(c, n, moe__candidates_limit(max, p));
    return moe__sampler_draw(sampler, n, max);
}

MOE__PRIVATE int32_t moe__sampler_top_k(moe_sampler *sampler, moe__logits *l, float max) {
    const moe_sampler_options *o = &sampler->options;
    moe__candidate *c = sampler->candidates;
    int32_t sorted = 0;
    int32_t n = moe__sampler_top(sampler, l, (int32_t)moe__min(o->top_k, l->n), &sorted);
    if (moe__sampler_has_top_p(o)) {
        const double needed = (double)o->top_p * moe__candidates_mass(c, n, max);
        n = moe__candidates_top_p(c, n, sorted, max, needed);
    }
    return moe__sampler_finish(sampler, n, max);
}

// ---- choosing from all -----------------------------------------------------------------------

// Without top-k nearly the whole vocabulary may be kept, and no list is made of it. In the order of
// candidates (likelier first, then the lower id) filters keep a beginning, so that the last one
// kept says all. The draw goes by the ids: it adds up the weights of each block, finds the block
// in which a random part of the sum is reached, then the token in it.
//
// Top-p finds the last one kept without sorting. Each weight is added to the slot of its logit,
// 1/128 wide; slots are gone through from the likeliest until p of the sum is reached, and only the
// candidates of the slot where that happens are sorted.

// Nothing behind `last` is kept.
MOE__PRIVATE void moe__sampler_cut(moe_sampler *sampler, float logit, int32_t id) {
    sampler->last.logit = logit;
    sampler->last.id = id;
    sampler->above = nextafterf(logit, INFINITY);
}

// The weights of a block, exp((logit - max) * scale), of those candidates that are kept; returns
// their sum. logit, weight: MOE__PEAK places each; weight may be NULL.
MOE__PRIVATE double moe__sampler_weigh(const moe_sampler *sampler, moe__logits *l, int32_t block,
                                       float max, double scale, float *logit, double *weight) {
    const moe__candidate last = sampler->last;
    const int32_t start = block * MOE__PEAK, last_block = last.id / MOE__PEAK;
    moe__logits_load(l, block, sampler->peaks[block], logit);
    const float least = block > last_block ? sampler->above : last.logit;
    if (block == last_block) // of equals the lower ids stay
        for (int32_t i = last.id - start + 1; i < MOE__PEAK; i++)
            if (logit[i] == last.logit) logit[i] = -INFINITY;
    return l->kernels->weigh(logit, MOE__PEAK, least, max, scale, weight);
}

// Draws by exp(logit / temperature).
MOE__PRIVATE int32_t moe__sampler_draw_all(moe_sampler *sampler, moe__logits *l, float max) {
    const double scale = 1 / (double)sampler->options.temperature;
    const int32_t n_blocks = moe__logits_blocks(l->n);
    double total = 0, sum = 0, before = 0, weight[MOE__PEAK];
    float logit[MOE__PEAK];
    int32_t block = 0, chosen = 0;
    for (int32_t b = 0; b < n_blocks; b++) {
        sampler->sums[b] = 0;
        if (sampler->peaks[b] < sampler->last.logit) continue;
        sampler->sums[b] = moe__sampler_weigh(sampler, l, b, max, scale, logit, NULL);
        total += sampler->sums[b];
    }
    const double point = moe__sampler_random(sampler) * total;
    for (int32_t b = 0; b < n_blocks && sum <= point; b++) {
        if (sampler->sums[b] == 0) continue;
        block = b; // the last one, if rounding leaves the sum too small; so below
        before = sum;
        sum += sampler->sums[b];
    }
    moe__sampler_weigh(sampler, l, block, max, scale, logit, weight);
    for (int32_t i = 0; i < MOE__PEAK && before <= point; i++) {
        if (weight[i] == 0) continue;
        chosen = block * MOE__PEAK + i;
        before += weight[i];
    }
    return chosen;
}

// The slots of n logits: slots of equal width for what lies below the largest one, and one more
// for all the rest.
MOE__INLINE void moe__top_p_slots(const float *logit, int32_t n, float max, int32_t *slot) {
    const float end = (float)MOE__TOP_P_SLOTS;
    for (int32_t i = 0; i < n; i++) {
        const float at = (max - logit[i]) * (1 / MOE__TOP_P_WIDTH); // may be NaN or infinite
        slot[i] = (int32_t)(at < end ? at : end);
    }
}

// Adds up the weights of all candidates, and those of each slot.
MOE__PRIVATE double moe__sampler_slots(moe_sampler *sampler, moe__logits *l, float max) {
    const int32_t n_blocks = moe__logits_blocks(l->n);
    double total = 0, weight[MOE__PEAK];
    float logit[MOE__PEAK];
    int32_t slot[MOE__PEAK];
    memset(sampler->slots, 0, (MOE__TOP_P_SLOTS + 1) * sizeof *sampler->slots);
    for (int32_t b = 0; b < n_blocks; b++) {
        total += moe__sampler_weigh(sampler, l, b, max, 1, logit, weight);
        moe__top_p_slots(logit, MOE__PEAK, max, slot);
        for (int32_t i = 0; i < MOE__PEAK; i++) sampler->slots[slot[i]] += weight[i];
    }
    return total;
}

// The candidates of one slot become the list; returns how many there are.
MOE__PRIVATE int32_t moe__sampler_slot(moe_sampler *sampler, moe__logits *l, float max,
                                       int32_t wanted) {
    const int32_t n_blocks = moe__logits_blocks(l->n);
    moe__top list = {sampler->candidates, l->n, 0};
    float logit[MOE__PEAK];
    int32_t slot[MOE__PEAK];
    for (int32_t b = 0; b < n_blocks; b++) {
        moe__top_p_slots(&sampler->peaks[b], 1, max, slot);
        if (slot[0] > wanted) continue;
        moe__logits_load(l, b, sampler->peaks[b], logit);
        moe__top_p_slots(logit, MOE__PEAK, max, slot);
        for (int32_t i = 0; i < MOE__PEAK; i++)
            if (slot[i] == wanted && logit[i] > -INFINITY)
                moe__top_add(&list, logit[i], b * MOE__PEAK + i);
    }
    return list.n;
}

MOE__PRIVATE void moe__sampler_top_p(moe_sampler *sampler, moe__logits *l, float max) {
    double needed = (double)sampler->options.top_p * moe__sampler_slots(sampler, l, max);
    moe__candidate *c = sampler->candidates;
    int32_t slot = 0;
    for (; slot < MOE__TOP_P_SLOTS && sampler->slots[slot] < needed; slot++)
        needed -= sampler->slots[slot];
    const int32_t n = moe__sampler_slot(sampler, l, max, slot);
    if (n == 0) return; // rounding: all of them are needed
    const int32_t kept = moe__candidates_top_p(c, n, 0, max, needed);
    moe__sampler_cut(sampler, c[kept - 1].logit, c[kept - 1].id);
}

MOE__PRIVATE int32_t moe__sampler_all(moe_sampler *sampler, moe__logits *l, float max) {
    const moe_sampler_options *o = &sampler->options;
    moe__sampler_cut(sampler, -FLT_MAX, INT32_MAX);
    if (moe__sampler_has_top_p(o)) moe__sampler_top_p(sampler, l, max);
    const float limit = o->min_p > 0 ? moe__candidates_limit(max, o->min_p) : -FLT_MAX;
    if (limit > sampler->last.logit) moe__sampler_cut(sampler, limit, INT32_MAX);
    return moe__sampler_draw_all(sampler, l, max);
}

MOE__PRIVATE int32_t moe__sampler_sample(moe_sampler *sampler, const float *logits) {
    const moe_sampler_options *o = &sampler->options;
    moe__logits l = {sampler->kernels,     logits, sampler->n_valid,  sampler->penalized,
                     sampler->n_penalized, 0,      o->repeat_penalty};
    if (o->temperature <= 0) return moe__logits_greedy(&l);
    const float max = moe__logits_peaks(&l, 0, moe__logits_blocks(l.n), sampler->peaks);
    if (!moe__logits_any(&l, max)) return 0;
    return o->top_k > 0 ? moe__sampler_top_k(sampler, &l, max) : moe__sampler_all(sampler, &l, max);
}
MOE_API int32_t moe_sampler_sample(moe_sampler *sampler, const float *logits) {
    fenv_t callers;
    if (!sampler || !logits) return 0;
    moe__floats_begin(&callers);
    const int32_t token = moe__sampler_sample(sampler, logits);
    moe__floats_end(&callers);
    return token;
}

// What moe_sampler_sample does with a temperature of 0 and nothing else.
MOE__PRIVATE int32_t moe__sample_greedy(const moe__kernels *kernels, const float *logits,
                                        int32_t n) {
    moe__logits l = {kernels, logits, n, NULL, 0, 0, 1};
    return moe__logits_greedy(&l);
}

// ---- text stream -----------------------------------------------------------------------------

// Tokens are bytes, callers get characters, and never one that a stop string may begin with:
//
//   token bytes -> partial: up to 3 bytes of a character -> text: ready | may begin a stop string
//
// Each character that comes makes stop strings certain (the text ends), possible (it is held
// back) or impossible (what is in front of the next possible beginning becomes ready).

// text[0 .. n_ready) can go out; text[n_ready .. n_text) is the beginning of a stop string so
// far, shorter than MOE__MAX_STOP.
typedef struct moe__stream {
    const moe_generate_options *options;
    char partial[4]; // the first n_partial bytes of a character
    int32_t n_partial;
    int32_t n_ready, n_text;
    int32_t stopped; // nothing more is taken; see reason
    moe_stop_reason reason;
    char text[MOE__STREAM_SIZE];
} moe__stream;

MOE__PRIVATE void moe__stream_init(moe__stream *stream, const moe_generate_options *options) {
    memset(stream, 0, sizeof *stream);
    stream->options = options;
}

MOE__PRIVATE void moe__stream_stop(moe__stream *stream, moe_stop_reason reason) {
    if (stream->stopped) return;
    stream->stopped = 1;
    stream->reason = reason;
}

MOE__PRIVATE void moe__stream_deliver(moe__stream *stream) {
    const moe_generate_options *options = stream->options;
    size_t size = (size_t)stream->n_ready;
    if (size == 0) return;
    if (options->on_text && !options->on_text(options->user, stream->text, size))
        moe__stream_stop(stream, MOE_STOP_CALLER);
    stream->n_text -= stream->n_ready;
    stream->n_ready = 0;
    memmove(stream->text, stream->text + size, (size_t)stream->n_text);
}

// The text has grown by a character: does a stop string end here, does one begin in the rest? Of
// several that end here the one that began first counts.
MOE__PRIVATE void moe__stream_look_for_stop(moe__stream *stream) {
    const moe_generate_options *options = stream->options;
    const char *text = stream->text;
    int32_t longest = 0;
    for (size_t i = 0; i < options->n_stop; i++) {
        int32_t size = (int32_t)strlen(options->stop[i]);
        if (size > longest && size <= stream->n_text - stream->n_ready &&
            memcmp(text + stream->n_text - size, options->stop[i], (size_t)size) == 0)
            longest = size;
    }
    if (longest) {
        stream->n_ready = stream->n_text -= longest;
        moe__stream_stop(stream, MOE_STOP_STRING);
        return;
    }
    for (; stream->n_ready < stream->n_text; stream->n_ready++) {
        const char *rest = text + stream->n_ready;
        size_t size = (size_t)(stream->n_text - stream->n_ready);
        for (size_t i = 0; i < options->n_stop; i++)
            if (strncmp(options->stop[i], rest, size) == 0) return;
    }
}

#define MOE__REPLACEMENT "\xEF\xBF\xBD" // U+FFFD, stands for bytes that are not UTF-8

// Adds one character.
MOE__PRIVATE void moe__stream_put(moe__stream *stream, const void *bytes, int32_t size) {
    if (stream->stopped) return;
    if (stream->n_text + size > MOE__STREAM_SIZE) moe__stream_deliver(stream);
    memcpy(stream->text + stream->n_text, bytes, (size_t)size);
    stream->n_text += size;
    moe__stream_look_for_stop(stream);
}

// Adds bytes, which may end anywhere in a character, and hands out what can be. What goes on
// with no character is U+FFFD; the byte that showed it may begin one itself.
MOE__PRIVATE void moe__stream_push(moe__stream *stream, const char *bytes, size_t size) {
    for (size_t i = 0; i < size && !stream->stopped; i++) {
        uint32_t code;
        stream->partial[stream->n_partial++] = bytes[i];
        const int n = moe__utf8_decode(stream->partial, (size_t)stream->n_partial, &code);
        if (n == MOE__UTF8_CUT) continue;
        if (n == MOE__UTF8_BAD && stream->n_partial > 1) i--;
        stream->n_partial = 0;
        if (n > 0) moe__stream_put(stream, stream->partial, n);
        else moe__stream_put(stream, MOE__REPLACEMENT, 3);
    }
    moe__stream_deliver(stream);
}

// The end: what is incomplete will not be completed, what was held back is text after all.
MOE__PRIVATE void moe__stream_finish(moe__stream *stream) {
    if (stream->stopped) return;
    if (stream->n_partial) moe__stream_put(stream, MOE__REPLACEMENT, 3);
    stream->n_ready = stream->n_text;
    moe__stream_deliver(stream);
}

// ---- generating ------------------------------------------------------------------------------

MOE_API const char *moe_stop_reason_text(moe_stop_reason reason) {
    switch (reason) {
    case MOE_STOP_LIMIT: return "as many tokens as asked for";
    case MOE_STOP_END: return "the model ended";
    case MOE_STOP_STRING: return "a stop string appeared";
    case MOE_STOP_CALLER: return "the caller stopped it";
    case MOE_STOP_CONTEXT: return "the context is full";
    }
    return "?";
}

MOE__PRIVATE moe_status moe__generate_check_stops(const moe_generate_options *options,
                                                  moe_error *error) {
    if (options->n_stop && !options->stop)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "stop", "stop is NULL but n_stop is not 0");
    for (size_t i = 0; i < options->n_stop; i++) {
        const char *stop = options->stop[i];
        const size_t length = stop ? strlen(stop) : 0;
        const size_t size = length > MOE__MAX_STOP ? MOE__MAX_STOP + 1 : length;
        size_t at = 0;
        for (int n; at < size; at += (size_t)n) {
            uint32_t code;
            n = moe__utf8_decode(stop + at, size - at, &code);
            if (n == MOE__UTF8_CUT) break;
            if (n == MOE__UTF8_BAD)
                return moe__fail(error, MOE_ERROR_ARGUMENT, "stop",
                                 "a stop string is not valid UTF-8");
        }
        if (size == 0 || size > MOE__MAX_STOP || at < size)
            return moe__fail(error, MOE_ERROR_ARGUMENT, "stop",
                             "a stop string must be 1 to %d bytes of valid UTF-8",
                             (int)MOE__MAX_STOP);
    }
    return MOE_OK;
}

MOE__PRIVATE moe_status moe__generate_check(const moe_session *session, const int32_t *prompt,
                                            int32_t n_prompt, const moe_generate_options *options,
                                            moe_error *error) {
    if (!session) return moe__fail(error, MOE_ERROR_ARGUMENT, "session", "session is NULL");
    const moe_model *model = moe_session_model(session);
    if (!moe_model_vocab(model))
        return moe__fail(error, MOE_ERROR_ARGUMENT, "session", "the model has no vocabulary");
    if (n_prompt < 0 || (n_prompt > 0 && !prompt))
        return moe__fail(error, MOE_ERROR_ARGUMENT, "prompt", "the prompt is NULL or negative");
    if (n_prompt == 0 && !moe_session_logits(session, -1))
        return moe__fail(error, MOE_ERROR_ARGUMENT, "prompt",
                         "the prompt is empty and so is the session");
    if (options->sampler && options->sampler->n_vocab != moe_model_get_info(model)->n_vocab)
        return moe__fail(error, MOE_ERROR_ARGUMENT, "sampler",
                         "the sampler was opened for %d logits, the model has %d",
                         (int)options->sampler->n_vocab, (int)moe_model_get_info(model)->n_vocab);
    return moe__generate_check_stops(options, error);
}

MOE__PRIVATE void moe__generate_report(moe__stream *stream, const moe_vocab *vocab,
                                       int32_t token) {
    char text[MOE__TOKEN_TEXT];
    if (stream->options->special == MOE_ON && moe_vocab_is_control(vocab, token)) {
        moe_string name = moe_vocab_token(vocab, token);
        moe__stream_push(stream, name.data, name.size);
        return;
    }
    size_t size = moe_vocab_text(vocab, token, text, sizeof text);
    moe__stream_push(stream, text, size < sizeof text ? size : sizeof text);
}

// Chooses a token and reports it, then evaluates it unless it is the last. Returns 0 at the end
// of it all, with the reason.
MOE__PRIVATE int moe__generate_step(moe_session *session, moe__stream *stream,
                                    moe_generate_result *result, moe_status *status,
                                    moe_error *error) {
    const moe_generate_options *options = stream->options;
    const moe_model *model = moe_session_model(session);
    const moe_vocab *vocab = moe_model_vocab(model);
    const float *logits = moe_session_logits(session, -1);
    moe_error why;
    result->reason = MOE_STOP_CALLER;
    if (!logits) return 0; // a callback has rewound the session
    int32_t n = (int32_t)moe__min(moe_vocab_size(vocab), moe_model_get_info(model)->n_vocab);
    int32_t token = options->sampler ? moe_sampler_sample(options->sampler, logits)
                                     : moe__sample_greedy(session->kernels, logits, n);
    if (!(logits[token] > -INFINITY)) {
        *status = moe__fail(error, MOE_ERROR_FORMAT, "logits",
                            "no logit is a number: the weights of the model are damaged");
        return 0;
    }
    result->next_token = token;
    result->reason = MOE_STOP_END;
    if (options->ignore_end != MOE_ON && moe_vocab_is_end(vocab, token)) return 0;
    result->n_generated++;
    moe__generate_report(stream, vocab, token);
    result->reason = stream->reason;
    if (stream->stopped) return 0;
    result->reason = MOE_STOP_LIMIT;
    if (options->max_tokens > 0 && result->n_generated >= options->max_tokens) return 0;
    moe_status evaluated = moe_session_eval(session, &token, 1, &why);
    result->reason = evaluated == MOE_ERROR_CONTEXT_FULL ? MOE_STOP_CONTEXT : MOE_STOP_CALLER;
    if (evaluated == MOE_ERROR_CONTEXT_FULL || evaluated == MOE_ERROR_CANCELLED) return 0;
    if (evaluated != MOE_OK) {
        *status = evaluated;
        if (error) *error = why;
        return 0;
    }
    result->next_token = -1;
    if (options->sampler) moe_sampler_accept(options->sampler, token);
    return 1;
}

MOE__PRIVATE moe_status moe__generate_run(moe_session *session, const int32_t *prompt,
                                          int32_t n_prompt, const moe_generate_options *options,
                                          moe_generate_result *result, moe_error *error) {
    moe__stream stream;
    moe_status status = moe__generate_check(session, prompt, n_prompt, options, error);
    if (status != MOE_OK) return status;
    double start = moe__seconds();
    if (n_prompt > 0) status = moe_session_eval(session, prompt, n_prompt, error);
    result->prompt_seconds = moe__seconds() - start;
    if (status == MOE_ERROR_CONTEXT_FULL) result->reason = MOE_STOP_CONTEXT;
    if (status != MOE_OK) return status;
    result->n_prompt = n_prompt;
    for (int32_t i = 0; options->sampler && i < n_prompt; i++)
        moe_sampler_accept(options->sampler, prompt[i]);
    start = moe__seconds();
    moe__stream_init(&stream, options);
    while (moe__generate_step(session, &stream, result, &status, error)) continue;
    moe__stream_finish(&stream);
    if (stream.stopped && stream.reason == MOE_STOP_STRING) result->reason = MOE_STOP_STRING;
    result->generate_seconds = moe__seconds() - start;
    return status;
}

// What an error leaves.
MOE__PRIVATE void moe__generate_none(moe_generate_result *result) {
    memset(result, 0, sizeof *result);
    result->reason = MOE_STOP_CALLER;
    result->next_token = -1;
}

MOE_API moe_status moe_generate(moe_session *session, const int32_t *prompt, int32_t n_prompt,
                                const moe_generate_options *options, moe_generate_result *result,
                                moe_error *error) {
    moe_generate_options defaults;
    moe_generate_result local;
    memset(&defaults, 0, sizeof defaults);
    moe__generate_none(&local);
    moe_status status =
        moe__generate_run(session, prompt, n_prompt, options ? options : &defaults, &local, error);
    if (result) *result = local;
    return status;
}

// Tokens of a text to be appended, *n of them, in memory that the caller frees.
MOE__PRIVATE moe_status moe__generate_tokenize(const moe_session *session, const char *text,
                                               int32_t **tokens, int64_t *n, moe_error *error) {
    const moe_vocab *vocab = moe_model_vocab(session->model);
    const int32_t length = session->length, room = session->info.n_ctx - length;
    const unsigned flags = length ? 0 : MOE_TOKENIZE_ADD_SPECIAL;
    *n = -(int64_t)MOE_ERROR_MEMORY;
    *tokens = (int32_t *)moe__alloc_array(&session->allocator, (uint64_t)room + 1, sizeof **tokens);
    if (*tokens) *n = moe_vocab_tokenize(vocab, text, strlen(text), flags, *tokens, (size_t)room);
    if (*n < 0)
        return moe__fail(error, (moe_status)-*n, "text", "cannot turn the text into tokens: %s",
                         *n == -(int64_t)MOE_ERROR_MEMORY ? "out of memory" : "it is too long");
    if (*n > room)
        return moe__fail(error, MOE_ERROR_CONTEXT_FULL, "n_ctx",
                         "%lld tokens do not fit behind %d of %d", (long long)*n, (int)length,
                         (int)session->info.n_ctx);
    return MOE_OK;
}

MOE_API moe_status moe_generate_text(moe_session *session, const char *text,
                                     const moe_generate_options *options,
                                     moe_generate_result *result, moe_error *error) {
    int32_t *tokens = NULL;
    int64_t n = -1; // what moe_generate refuses, saying what is missing
    moe_status status = MOE_OK;
    if (session && text && moe_model_vocab(session->model))
        status = moe__generate_tokenize(session, text, &tokens, &n, error);
    if (!status) status = moe_generate(session, tokens, (int32_t)n, options, result, error);
    else if (result) moe__generate_none(result);
    if (result && status == MOE_ERROR_CONTEXT_FULL) result->reason = MOE_STOP_CONTEXT;
    if (tokens) moe__free(&session->allocator, tokens);
    return status;
}

// Products of what follows this file are fused or not as its compiler was told.
#if !defined(__clang__)
#pragma GCC pop_options
#elif defined(__x86_64__)
#pragma float_control(pop)
#else
#pragma STDC FP_CONTRACT DEFAULT // clang 14 has no float_control here
#endif
#endif // MOE__IMPLEMENT

// ==============================================================================================
// >>licence
//
// This software is available under two licences: choose whichever you prefer.
//
// ALTERNATIVE A - MIT License
// Copyright (c) 2026 the authors of moe_infer.h
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software
// and associated documentation files (the "Software"), to deal in the Software without
// restriction, including without limitation the rights to use, copy, modify, merge, publish,
// distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
// Software is furnished to do so, subject to the following conditions:
// The above copyright notice and this permission notice shall be included in all copies or
// substantial portions of the Software.
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
// BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
// NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
// DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
// OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
//
// ALTERNATIVE B - Public Domain (www.unlicense.org)
// This is free and unencumbered software released into the public domain.
// Anyone is free to copy, modify, publish, use, compile, sell, or distribute this software,
// either in source code form or as a compiled binary, for any purpose, commercial or
// non-commercial, and by any means.
// In jurisdictions that recognize copyright laws, the author or authors of this software
// dedicate any and all copyright interest in the software to the public domain. We make this
// dedication for the benefit of the public at large and to the detriment of our heirs and
// successors. We intend this dedication to be an overt act of relinquishment in perpetuity of
// all present and future rights to this software under copyright law.
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
// BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
// NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
// LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
// CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
// ==============================================================================================
