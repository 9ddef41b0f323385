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

#define KTT_ABI_VERSION 1

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

/* Instruction sets, worst first. */
enum { KTT_ISA_AUTO = 0, KTT_ISA_AVX2 = 1, KTT_ISA_AVX512 = 2, KTT_ISA_AMX = 3 };

/* How the weights are stored: bfloat16, or float8 e4m3fn with one fp32 scale for 128x128 weights.
 */
enum { KTT_FORMAT_BF16 = 0, KTT_FORMAT_FP8 = 1 };

/* Element type of x and out; as a layer's activation mode: what the matrix products multiply. */
enum { KTT_FLOAT32 = 0, KTT_BFLOAT16 = 1 };

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

KTT_API int32_t ktt_pool_info(const ktt_pool* pool, int32_t* isa, int32_t* num_threads,
                              int32_t* num_nodes);

/* One MoE layer's routed experts. hidden_size and intermediate_size are multiples of 32. A forward
 * takes at most max_tokens tokens of at most max_top_k experts each. */
KTT_API int32_t ktt_layer_create(ktt_pool* pool, int32_t num_experts, int32_t hidden_size,
                                 int32_t intermediate_size, int32_t weight_format,
                                 int32_t activation, int32_t max_tokens, int32_t max_top_k,
                                 ktt_layer** layer);

/* Waits for a forward under way. NULL is fine. */
KTT_API int32_t ktt_layer_destroy(ktt_layer* layer);

/* Copies one expert's weights: gate and up [intermediate, hidden], down [hidden, intermediate], row
 * major, matrix_bytes each. FP8 also takes scales [ceil(rows / 128), ceil(columns / 128)], row
 * major, of num_scales values each; BF16 takes NULL and 0. */
KTT_API int32_t ktt_layer_set_expert(ktt_layer* layer, int32_t expert, const void* gate,
                                     const void* up, const void* down, uint64_t matrix_bytes,
                                     const float* gate_scale, const float* up_scale,
                                     const float* down_scale, uint64_t num_scales);

/* out[t] = sum over k of weights[t][k] * down(silu(gate x[t]) * up x[t]) of expert ids[t][k].
 * ids and weights are [num_tokens, top_k], an id of -1 is skipped; x and out are
 * [num_tokens, hidden], both of type dtype, and may be the same memory. Blocks until done;
 * forwards of one pool run one after the other. */
KTT_API int32_t ktt_layer_forward(ktt_layer* layer, int32_t num_tokens, int32_t top_k,
                                  const int32_t* ids, const float* weights, int32_t dtype,
                                  const void* x, void* out);

/* Bytes of packed weights and scales of the experts set so far. */
KTT_API int32_t ktt_layer_bytes(const ktt_layer* layer, uint64_t* num_bytes);

#ifdef __cplusplus
}
#endif

#endif /* KTTRIO_H */
