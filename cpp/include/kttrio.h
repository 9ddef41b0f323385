/* The whole wall between the expert library and its callers: plain C functions, fixed-width types.
 *
 * Every function that can fail returns KTT_OK or an error code; ktt_last_error() then tells, for
 * the calling thread, what was wrong and what to do. No function throws or aborts. Nothing keeps a
 * pointer into the caller's memory after it returns; pointers need no more alignment than their
 * elements. Threads may share pools and layers. A process forked from the one that made a pool may
 * only destroy it.
 */
#ifndef KTTRIO_H
#define KTTRIO_H

#include <stdint.h>

#define KTT_ABI_VERSION 2

#if defined(__GNUC__)
#define KTT_API __attribute__((visibility("default")))
#else
#define KTT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What a function returns. */
enum {
  KTT_OK = 0,
  KTT_INVALID_ARGUMENT = 1, /* a size, pointer, enum or value that cannot work */
  KTT_UNSUPPORTED = 2,      /* the machine or its operating system does not grant it */
  KTT_OUT_OF_MEMORY = 3,
  KTT_INTERNAL = 4
};

/* Instruction sets. KTT_ISA_AUTO takes the best that is granted, KTT_ISA_AVX2 and KTT_ISA_AVX512
 * the best of their kind; the others are single kernel tables, for tests and measurements. */
enum {
  KTT_ISA_AUTO = 0,
  KTT_ISA_AVX2 = 1,
  KTT_ISA_AVX512 = 2,
  KTT_ISA_AMX = 3,
  KTT_ISA_AVX2_BASE = 4, /* AVX2, FMA, F16C */
  KTT_ISA_AVX2_VNNI = 5,
  KTT_ISA_AVX512_BASE = 6, /* F, BW, DQ, VL */
  KTT_ISA_AVX512_VNNI = 7,
  KTT_ISA_AVX512_BF16 = 8 /* with VNNI and VBMI */
};

/* How the weights are stored.
 *   BF16  bfloat16
 *   FP8   float8 e4m3fn, one fp32 scale for a square of 128 x 128
 *   INT8  two's complement, one bfloat16 scale for `group` weights of a row
 *   INT4  value + 8 in four bits, two to a byte, the lower column in the low bits; scales as INT8
 */
enum { KTT_FORMAT_BF16 = 0, KTT_FORMAT_FP8 = 1, KTT_FORMAT_INT8 = 2, KTT_FORMAT_INT4 = 3 };

/* Element type of x and out. */
enum { KTT_FLOAT32 = 0, KTT_BFLOAT16 = 1 };

/* A layer's activation mode: what the matrix products multiply. INT8 quantises activations by
 * group and is for INT8 and INT4 weights. */
enum { KTT_ACTIVATION_FLOAT32 = 0, KTT_ACTIVATION_BFLOAT16 = 1, KTT_ACTIVATION_INT8 = 2 };

typedef struct ktt_pool ktt_pool;
typedef struct ktt_layer ktt_layer;

/* KTT_ABI_VERSION of the library, to be compared with the header's. */
KTT_API int32_t ktt_abi_version(void);

/* What went wrong in this thread's last failed call; "" when nothing has. Valid until the next one.
 */
KTT_API const char* ktt_last_error(void);

/* 1 when both the processor and the operating system grant the instruction set, else 0. */
KTT_API int32_t ktt_isa_granted(int32_t isa);

/* Starts the workers. The calling thread of each forward is one of num_threads; 0 takes one for
 * each core this process may use, or fewer if its control group grants less time. num_nodes parts
 * with workers and memory of their own: 0 makes one for each NUMA node this process may use;
 * nodes[i] is the NUMA node of part i (a node may come twice), or nodes is NULL and the parts go
 * round the NUMA nodes. */
KTT_API int32_t ktt_pool_create(int32_t isa, int32_t num_threads, const int32_t* nodes,
                                int32_t num_nodes, ktt_pool** pool);

/* Layers keep their pool alive: pool and layers may be destroyed in any order. NULL is fine. */
KTT_API int32_t ktt_pool_destroy(ktt_pool* pool);

/* isa is that of the kernel table in use, never one of those that stand for several. */
KTT_API int32_t ktt_pool_info(const ktt_pool* pool, int32_t* isa, int32_t* num_threads,
                              int32_t* num_nodes);

/* One MoE layer's routed experts. hidden_size and intermediate_size are multiples of 32. group_size
 * is 32, 64 or 128 for INT8 and INT4, 128 for FP8 and 0 for BF16. A forward takes at most
 * max_tokens tokens of at most max_top_k experts each. */
KTT_API int32_t ktt_layer_create(ktt_pool* pool, int32_t num_experts, int32_t hidden_size,
                                 int32_t intermediate_size, int32_t weight_format,
                                 int32_t group_size, int32_t activation, int32_t max_tokens,
                                 int32_t max_top_k, ktt_layer** layer);

/* Waits for a forward under way. NULL is fine; the layer's jobs are destroyed before it. */
KTT_API int32_t ktt_layer_destroy(ktt_layer* layer);

/* One expert's weights, row major: gate and up [intermediate, hidden], down [hidden, intermediate],
 * matrix_bytes each. Scales: FP8 fp32 [ceil(rows / 128), ceil(columns / 128)], INT8 and INT4
 * bfloat16 [rows, ceil(columns / group_size)], BF16 NULL and 0 bytes. */
typedef struct {
  void* gate;
  void* up;
  void* down;
  void* gate_scale;
  void* up_scale;
  void* down_scale;
  uint64_t matrix_bytes;
  uint64_t gate_scale_bytes; /* of up_scale as well */
  uint64_t down_scale_bytes;
} ktt_expert;

/* Copies an expert in; a weight or scale that is no finite number is refused (bfloat16 weights are
 * taken as they are) and the expert then counts as not set. Replacing one that is set is fine, also
 * between forwards. */
KTT_API int32_t ktt_layer_set_expert(ktt_layer* layer, int32_t expert, const ktt_expert* source);

/* Copies an expert that is set out again, bit for bit as it came in. On the calling thread alone,
 * so that forwards are not held up; several threads may do so at a time. */
KTT_API int32_t ktt_layer_get_expert(ktt_layer* layer, int32_t expert, const ktt_expert* target);

/* Takes an expert out and gives its memory back; one that is not set is fine. */
KTT_API int32_t ktt_layer_clear_expert(ktt_layer* layer, int32_t expert);

/* Arguments of a forward. out[t] = sum over k of weights[t][k] * down(silu(gate x[t]) * up x[t]) of
 * expert ids[t][k]; with accumulate != 0 that is added to out[t]. ids and weights are
 * [num_tokens, top_k], an id of -1 is skipped; x and out are [num_tokens, hidden], both of type
 * dtype, and may be the same memory unless accumulating. */
typedef struct {
  int32_t num_tokens;
  int32_t top_k;
  const int32_t* ids;
  const float* weights;
  const void* x;
  void* out;
  int32_t dtype;
  int32_t accumulate;
} ktt_forward;

/* Blocks until done; the calling thread is one of the workers. Forwards of one pool run one after
 * the other. */
KTT_API int32_t ktt_layer_forward(ktt_layer* layer, const ktt_forward* args);

/* A forward with fixed arguments that is started without waiting for it, any number of times: the
 * pool's own dispatching thread takes the caller's place among the workers. Jobs of one pool run in
 * the order they were submitted. The arguments are copied, what they point to is read when the job
 * runs. num_tokens, when not NULL, replaces args->num_tokens (its upper limit) and is read then.
 * A job may be waited for before its arguments are ready: when `ready` is not NULL the dispatcher
 * first waits until *ready is at least the number of submissions so far; when `done` is not NULL it
 * stores that number there at the end. Both may lie in pinned memory that a device writes and
 * reads. */
typedef struct ktt_job ktt_job;
KTT_API int32_t ktt_job_create(ktt_layer* layer, const ktt_forward* args, const int32_t* num_tokens,
                               const uint32_t* ready, uint32_t* done, ktt_job** job);

/* Waits for its last submission, or drops it if its arguments are not ready. NULL is fine. */
KTT_API int32_t ktt_job_destroy(ktt_job* job);

/* Errors of the forward itself are reported by the wait that follows. A job that is still pending
 * cannot be submitted again. */
KTT_API int32_t ktt_job_submit(ktt_job* job);
KTT_API int32_t ktt_job_wait(ktt_job* job);

/* The same as host functions of a CUDA stream: what is wrong is kept for ktt_job_wait. */
KTT_API void ktt_job_submit_on_stream(void* job);
KTT_API void ktt_job_wait_on_stream(void* job);

/* Bytes of packed weights and scales of the experts set so far. */
KTT_API int32_t ktt_layer_bytes(const ktt_layer* layer, uint64_t* num_bytes);

#ifdef __cplusplus
}
#endif

#endif /* KTTRIO_H */
