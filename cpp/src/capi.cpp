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

namespace {

using ktt::Error;
using ktt::ErrorCode;
using ktt::require;

static_assert(KTT_FORMAT_BF16 == static_cast<int>(ktt::WeightFormat::kBf16));
static_assert(KTT_FORMAT_FP8 == static_cast<int>(ktt::WeightFormat::kFp8));
static_assert(KTT_FLOAT32 == static_cast<int>(ktt::Dtype::kFloat32));
static_assert(KTT_BFLOAT16 == static_cast<int>(ktt::Dtype::kBfloat16));
static_assert(KTT_ISA_AMX == static_cast<int>(ktt::Isa::kAmx));

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

ktt::Dtype checked_dtype(const char* name, int32_t value) {
  return static_cast<ktt::Dtype>(checked(name, value, KTT_FLOAT32, KTT_BFLOAT16));
}

void check_source(const ktt::LayerShape& shape, const ktt::ExpertSource& source,
                  uint64_t matrix_bytes, uint64_t num_scales) {
  require_pointer(source.gate, "gate");
  require_pointer(source.up, "up");
  require_pointer(source.down, "down");
  const auto traits = ktt::traits(shape.format);
  check_bytes("matrix_bytes", matrix_bytes,
              shape.hidden_size * shape.intermediate_size * traits.element_bytes);
  if (traits.scale_block == 0) {
    require(source.gate_scale == nullptr && source.up_scale == nullptr &&
                source.down_scale == nullptr && num_scales == 0,
            "this layer's weight format has no scales, but scales were given");
    return;
  }
  require_pointer(source.gate_scale, "gate_scale");
  require_pointer(source.up_scale, "up_scale");
  require_pointer(source.down_scale, "down_scale");
  const auto blocks = [&](size_t size) {
    return (size + traits.scale_block - 1) / traits.scale_block;
  };
  check_bytes("num_scales", num_scales,
              blocks(shape.hidden_size) * blocks(shape.intermediate_size));
}

}  // namespace

extern "C" {

int32_t ktt_abi_version(void) { return KTT_ABI_VERSION; }

const char* ktt_last_error(void) { return last_error; }

int32_t ktt_isa_granted(int32_t isa) {
  if (isa < KTT_ISA_AVX2 || isa > KTT_ISA_AMX) return 0;
  return ktt::isa_granted(static_cast<ktt::Isa>(isa)) ? 1 : 0;
}

int32_t ktt_pool_create(int32_t isa, int32_t num_threads, const int32_t* nodes, int32_t num_nodes,
                        ktt_pool** pool) {
  return guarded([&] {
    require_pointer(pool, "pool");
    const auto chosen = static_cast<ktt::Isa>(checked("isa", isa, KTT_ISA_AUTO, KTT_ISA_AMX));
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
                         int32_t intermediate_size, int32_t weight_format, int32_t activation,
                         int32_t max_tokens, int32_t max_top_k, ktt_layer** layer) {
  return guarded([&] {
    require_pointer(pool, "pool");
    require_pointer(layer, "layer");
    const ktt::LayerShape shape = {
        checked("num_experts", num_experts, 1, kMaxExperts),
        checked_size("hidden_size", hidden_size),
        checked_size("intermediate_size", intermediate_size),
        static_cast<ktt::WeightFormat>(
            checked("weight_format", weight_format, KTT_FORMAT_BF16, KTT_FORMAT_FP8))};
    const ktt::LayerLimits limits = {checked("max_tokens", max_tokens, 1, kMaxTokens),
                                     checked("max_top_k", max_top_k, 1, kMaxTopK)};
    *layer = new ktt_layer{
        ktt::Layer(pool->engine, shape, checked_dtype("activation", activation), limits)};
  });
}

int32_t ktt_layer_destroy(ktt_layer* layer) {
  return guarded([&] { delete layer; });
}

int32_t ktt_layer_set_expert(ktt_layer* layer, int32_t expert, const void* gate, const void* up,
                             const void* down, uint64_t matrix_bytes, const float* gate_scale,
                             const float* up_scale, const float* down_scale, uint64_t num_scales) {
  return guarded([&] {
    require_pointer(layer, "layer");
    const auto& shape = layer->layer.shape();
    const auto num_experts = static_cast<int32_t>(shape.num_experts);
    const size_t index = checked("expert", expert, 0, num_experts - 1);
    const ktt::ExpertSource source = {gate, up, down, gate_scale, up_scale, down_scale};
    check_source(shape, source, matrix_bytes, num_scales);
    layer->layer.set_expert(index, source);
  });
}

int32_t ktt_layer_forward(ktt_layer* layer, int32_t num_tokens, int32_t top_k, const int32_t* ids,
                          const float* weights, int32_t dtype, const void* x, void* out) {
  return guarded([&] {
    require_pointer(layer, "layer");
    const auto& limits = layer->layer.limits();
    ktt::ForwardArgs args{};
    args.choices.num_tokens =
        checked("num_tokens", num_tokens, 0, static_cast<int32_t>(limits.max_tokens));
    args.choices.top_k = checked("top_k", top_k, 1, static_cast<int32_t>(limits.max_top_k));
    args.dtype = checked_dtype("dtype", dtype);
    if (num_tokens == 0) return;
    require_pointer(ids, "ids");
    require_pointer(weights, "weights");
    require_pointer(x, "x");
    require_pointer(out, "out");
    args.choices.ids = ids;
    args.choices.weights = weights;
    args.x = x;
    args.out = out;
    layer->layer.forward(args);
  });
}

int32_t ktt_layer_bytes(const ktt_layer* layer, uint64_t* num_bytes) {
  return guarded([&] {
    require_pointer(layer, "layer");
    require_pointer(num_bytes, "num_bytes");
    *num_bytes = layer->layer.num_bytes();
  });
}

}  // extern "C"
