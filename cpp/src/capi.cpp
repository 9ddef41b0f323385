// The C names: checks what comes in, calls the C++ side, turns exceptions into codes. The only
// place that catches, and the only one that knows kttrio.h.
#include <memory>
#include <new>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "kttrio.h"
#include "moe.h"

struct ktt_pool {
  std::shared_ptr<ktt::Engine> engine;
};

struct ktt_layer {
  ktt::Layer layer;
};

struct ktt_job {
  ktt::Job job;
};

namespace {

using ktt::Error;
using ktt::ErrorCode;
using ktt::require;

static_assert(KTT_FORMAT_BF16 == static_cast<int>(ktt::WeightFormat::kBf16));
static_assert(KTT_FORMAT_FP8 == static_cast<int>(ktt::WeightFormat::kFp8));
static_assert(KTT_FORMAT_INT8 == static_cast<int>(ktt::WeightFormat::kInt8));
static_assert(KTT_FORMAT_INT4 == static_cast<int>(ktt::WeightFormat::kInt4));
static_assert(KTT_FLOAT32 == static_cast<int>(ktt::Dtype::kFloat32));
static_assert(KTT_BFLOAT16 == static_cast<int>(ktt::Dtype::kBfloat16));
static_assert(KTT_ACTIVATION_FLOAT32 == static_cast<int>(ktt::Activation::kFloat32));
static_assert(KTT_ACTIVATION_BFLOAT16 == static_cast<int>(ktt::Activation::kBfloat16));
static_assert(KTT_ACTIVATION_INT8 == static_cast<int>(ktt::Activation::kInt8));
static_assert(KTT_ISA_AVX2 == static_cast<int>(ktt::Isa::kAvx2));
static_assert(KTT_ISA_AVX512 == static_cast<int>(ktt::Isa::kAvx512));
static_assert(KTT_ISA_AMX == static_cast<int>(ktt::Isa::kAmx));
static_assert(KTT_ISA_AVX2_BASE == static_cast<int>(ktt::Isa::kAvx2Base));
static_assert(KTT_ISA_AVX2_VNNI == static_cast<int>(ktt::Isa::kAvx2Vnni));
static_assert(KTT_ISA_AVX512_BASE == static_cast<int>(ktt::Isa::kAvx512Base));
static_assert(KTT_ISA_AVX512_VNNI == static_cast<int>(ktt::Isa::kAvx512Vnni));
static_assert(KTT_ISA_AVX512_BF16 == static_cast<int>(ktt::Isa::kAvx512Bf16));

constexpr int32_t kMaxThreads = 4096;
constexpr int32_t kMaxParts = 64;
constexpr int32_t kMaxExperts = 1 << 16;
constexpr int32_t kMaxSize = 1 << 18;
constexpr int32_t kMaxTokens = 1 << 17;
constexpr int32_t kMaxTopK = 1 << 8;

// An allocation-free message survives even when memory does not.
thread_local char last_error[1024] = "";

int32_t fail(int32_t code, const char* message) noexcept {
  size_t i = 0;
  for (; message[i] != '\0' && i + 1 < sizeof(last_error); ++i) last_error[i] = message[i];
  last_error[i] = '\0';
  return code;
}

template <class Fn>
int32_t guarded(Fn&& fn) noexcept {
  try {
    fn();
    return KTT_OK;
  } catch (const Error& e) {
    return fail(e.code() == ErrorCode::kUnsupported ? KTT_UNSUPPORTED : KTT_INVALID_ARGUMENT,
                e.what());
  } catch (const std::bad_alloc&) {
    return fail(KTT_OUT_OF_MEMORY, "out of memory; use fewer experts here or a smaller max_tokens");
  } catch (const std::exception& e) {
    return fail(KTT_INTERNAL, e.what());
  } catch (...) {
    return fail(KTT_INTERNAL, "unknown error");
  }
}

size_t checked(const char* name, int32_t value, int32_t low, int32_t high) {
  if (value < low || value > high) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is " + std::to_string(value) +
                                                 ", but must be from " + std::to_string(low) +
                                                 " to " + std::to_string(high));
  }
  return static_cast<size_t>(value);
}

size_t checked_size(const char* name, int32_t value) {
  const size_t size = checked(name, value, 1, kMaxSize);
  if (size % ktt::kStepDepth != 0) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is " + std::to_string(value) +
                                                 ", but must be a multiple of 32");
  }
  return size;
}

void require_pointer(const void* pointer, const char* name) {
  if (pointer == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is a null pointer");
  }
}

void check_bytes(const char* name, uint64_t given, uint64_t wanted) {
  if (given != wanted) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is " + std::to_string(given) +
                                                 ", but this layer needs " +
                                                 std::to_string(wanted));
  }
}

// The group that LayerShape wants: formats without scales have one as well.
size_t checked_group(ktt::WeightFormat format, int32_t group_size) {
  const auto refuse = [&](const char* wanted) {
    throw Error(ErrorCode::kInvalidArgument,
                "group_size is " + std::to_string(group_size) + ", but must be " + wanted);
  };
  switch (ktt::traits(format).scales) {
    case ktt::Scales::kNone:
      if (group_size != 0) refuse("0 for weights without scales");
      return ktt::kChunkDepth;
    case ktt::Scales::kSquares:
      if (group_size != 128) refuse("128 for fp8 weights");
      return ktt::kChunkDepth;
    case ktt::Scales::kGroups:
      if (group_size != 32 && group_size != 64 && group_size != 128) {
        refuse("32, 64 or 128 for int8 and int4 weights");
      }
  }
  return static_cast<size_t>(group_size);
}

ktt::LayerShape checked_shape(int32_t num_experts, int32_t hidden_size, int32_t intermediate_size,
                              int32_t weight_format, int32_t group_size) {
  ktt::LayerShape shape;
  shape.num_experts = checked("num_experts", num_experts, 1, kMaxExperts);
  shape.hidden_size = checked_size("hidden_size", hidden_size);
  shape.intermediate_size = checked_size("intermediate_size", intermediate_size);
  shape.format = static_cast<ktt::WeightFormat>(
      checked("weight_format", weight_format, KTT_FORMAT_BF16, KTT_FORMAT_INT4));
  shape.group = checked_group(shape.format, group_size);
  return shape;
}

size_t checked_expert(const ktt_layer* layer, int32_t expert) {
  require_pointer(layer, "layer");
  const auto num_experts = static_cast<int32_t>(layer->layer.shape().num_experts);
  return checked("expert", expert, 0, num_experts - 1);
}

uint64_t scale_bytes(const ktt::LayerShape& shape, size_t rows, size_t columns) {
  const auto traits = ktt::traits(shape.format);
  const auto ceil_div = [](size_t a, size_t b) { return (a + b - 1) / b; };
  if (traits.scales == ktt::Scales::kSquares) rows = ceil_div(rows, ktt::kChunkDepth);
  return rows * ceil_div(columns, shape.group) * traits.scale_bytes;
}

void check_scales(const ktt::LayerShape& shape, const ktt_expert& expert) {
  if (ktt::traits(shape.format).scales == ktt::Scales::kNone) {
    require(
        expert.gate_scale == nullptr && expert.up_scale == nullptr && expert.down_scale == nullptr,
        "this layer's weight format has no scales, but scales were given");
  } else {
    require_pointer(expert.gate_scale, "gate_scale");
    require_pointer(expert.up_scale, "up_scale");
    require_pointer(expert.down_scale, "down_scale");
  }
  check_bytes("gate_scale_bytes", expert.gate_scale_bytes,
              scale_bytes(shape, shape.intermediate_size, shape.hidden_size));
  check_bytes("down_scale_bytes", expert.down_scale_bytes,
              scale_bytes(shape, shape.hidden_size, shape.intermediate_size));
}

void check_expert(const ktt::LayerShape& shape, const ktt_expert* expert) {
  require_pointer(expert, "the expert");
  require_pointer(expert->gate, "gate");
  require_pointer(expert->up, "up");
  require_pointer(expert->down, "down");
  check_bytes("matrix_bytes", expert->matrix_bytes,
              ktt::weight_bytes(shape.format, shape.hidden_size * shape.intermediate_size));
  check_scales(shape, *expert);
}

ktt::ForwardArgs checked_forward(const ktt_layer* layer, const ktt_forward* args) {
  require_pointer(layer, "layer");
  require_pointer(args, "args");
  const auto& limits = layer->layer.limits();
  ktt::ForwardArgs checked_args{};
  checked_args.choices.num_tokens =
      checked("num_tokens", args->num_tokens, 0, static_cast<int32_t>(limits.max_tokens));
  checked_args.choices.top_k =
      checked("top_k", args->top_k, 1, static_cast<int32_t>(limits.max_top_k));
  checked_args.dtype =
      static_cast<ktt::Dtype>(checked("dtype", args->dtype, KTT_FLOAT32, KTT_BFLOAT16));
  checked_args.accumulate = args->accumulate != 0;
  if (args->num_tokens == 0) return checked_args;
  require_pointer(args->ids, "ids");
  require_pointer(args->weights, "weights");
  require_pointer(args->x, "x");
  require_pointer(args->out, "out");
  require(args->x != args->out || args->accumulate == 0,
          "x and out are the same memory, which does not go with accumulate");
  checked_args.choices.ids = args->ids;
  checked_args.choices.weights = args->weights;
  checked_args.x = args->x;
  checked_args.out = args->out;
  return checked_args;
}

}  // namespace

extern "C" {

int32_t ktt_abi_version(void) { return KTT_ABI_VERSION; }

const char* ktt_last_error(void) { return last_error; }

int32_t ktt_isa_granted(int32_t isa) {
  if (isa < KTT_ISA_AVX2 || isa > KTT_ISA_AVX512_BF16) return 0;
  return ktt::isa_granted(static_cast<ktt::Isa>(isa)) ? 1 : 0;
}

int32_t ktt_pool_create(int32_t isa, int32_t num_threads, const int32_t* nodes, int32_t num_nodes,
                        ktt_pool** pool) {
  return guarded([&] {
    require_pointer(pool, "pool");
    const auto chosen =
        static_cast<ktt::Isa>(checked("isa", isa, KTT_ISA_AUTO, KTT_ISA_AVX512_BF16));
    ktt::PoolOptions options;
    options.num_threads = checked("num_threads", num_threads, 0, kMaxThreads);
    options.num_parts = checked("num_nodes", num_nodes, 0, kMaxParts);
    if (nodes != nullptr) options.nodes.assign(nodes, nodes + num_nodes);
    *pool = new ktt_pool{std::make_shared<ktt::Engine>(options, ktt::dispatch(chosen))};
  });
}

int32_t ktt_pool_destroy(ktt_pool* pool) {
  return guarded([&] { delete pool; });
}

int32_t ktt_pool_info(const ktt_pool* pool, int32_t* isa, int32_t* num_threads,
                      int32_t* num_nodes) {
  return guarded([&] {
    require_pointer(pool, "pool");
    require_pointer(isa, "isa");
    require_pointer(num_threads, "num_threads");
    require_pointer(num_nodes, "num_nodes");
    *isa = static_cast<int32_t>(pool->engine->dispatch.isa);
    *num_threads = static_cast<int32_t>(pool->engine->pool.num_threads());
    *num_nodes = static_cast<int32_t>(pool->engine->pool.num_parts());
  });
}

int32_t ktt_layer_create(ktt_pool* pool, int32_t num_experts, int32_t hidden_size,
                         int32_t intermediate_size, int32_t weight_format, int32_t group_size,
                         int32_t activation, int32_t max_tokens, int32_t max_top_k,
                         ktt_layer** layer) {
  return guarded([&] {
    require_pointer(pool, "pool");
    require_pointer(layer, "layer");
    const auto shape =
        checked_shape(num_experts, hidden_size, intermediate_size, weight_format, group_size);
    const auto mode = static_cast<ktt::Activation>(
        checked("activation", activation, KTT_ACTIVATION_FLOAT32, KTT_ACTIVATION_INT8));
    const ktt::LayerLimits limits = {checked("max_tokens", max_tokens, 1, kMaxTokens),
                                     checked("max_top_k", max_top_k, 1, kMaxTopK)};
    *layer = new ktt_layer{ktt::Layer(pool->engine, shape, mode, limits)};
  });
}

int32_t ktt_layer_destroy(ktt_layer* layer) {
  return guarded([&] { delete layer; });
}

int32_t ktt_layer_set_expert(ktt_layer* layer, int32_t expert, const ktt_expert* source) {
  return guarded([&] {
    const size_t index = checked_expert(layer, expert);
    check_expert(layer->layer.shape(), source);
    layer->layer.set_expert(index, {source->gate, source->up, source->down, source->gate_scale,
                                    source->up_scale, source->down_scale});
  });
}

int32_t ktt_layer_get_expert(ktt_layer* layer, int32_t expert, const ktt_expert* target) {
  return guarded([&] {
    const size_t index = checked_expert(layer, expert);
    check_expert(layer->layer.shape(), target);
    layer->layer.get_expert(index, {target->gate, target->up, target->down, target->gate_scale,
                                    target->up_scale, target->down_scale});
  });
}

int32_t ktt_layer_clear_expert(ktt_layer* layer, int32_t expert) {
  return guarded([&] {
    const size_t index = checked_expert(layer, expert);
    layer->layer.clear_expert(index);
  });
}

int32_t ktt_layer_forward(ktt_layer* layer, const ktt_forward* args) {
  return guarded([&] {
    const auto checked_args = checked_forward(layer, args);
    layer->layer.forward(checked_args);
  });
}

int32_t ktt_job_create(ktt_layer* layer, const ktt_forward* args, const int32_t* num_tokens,
                       const uint32_t* ready, uint32_t* done, ktt_job** job) {
  return guarded([&] {
    require_pointer(job, "job");
    const auto checked_args = checked_forward(layer, args);
    *job = new ktt_job{ktt::Job(layer->layer, checked_args, num_tokens, ready, done)};
  });
}

int32_t ktt_job_destroy(ktt_job* job) {
  return guarded([&] { delete job; });
}

int32_t ktt_job_submit(ktt_job* job) {
  return guarded([&] {
    require_pointer(job, "job");
    job->job.submit();
  });
}

int32_t ktt_job_wait(ktt_job* job) {
  return guarded([&] {
    require_pointer(job, "job");
    job->job.wait();
  });
}

void ktt_job_submit_on_stream(void* job) { static_cast<ktt_job*>(job)->job.submit_on_stream(); }

void ktt_job_wait_on_stream(void* job) { static_cast<ktt_job*>(job)->job.wait_on_stream(); }

int32_t ktt_layer_bytes(const ktt_layer* layer, uint64_t* num_bytes) {
  return guarded([&] {
    require_pointer(layer, "layer");
    require_pointer(num_bytes, "num_bytes");
    *num_bytes = layer->layer.num_bytes();
  });
}

}  // extern "C"
