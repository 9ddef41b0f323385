// The C names: checks what comes in (see checks.h), calls the C++ side, turns exceptions into
// codes.
#include <memory>
#include <new>

#include "capi_checks.h"
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

using ktt::checked;
using ktt::Error;
using ktt::ErrorCode;
using ktt::require_pointer;

constexpr int32_t kMaxThreads = 4096;
constexpr int32_t kMaxParts = 64;

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

ktt::Layer& checked_layer(ktt_layer* layer) {
  require_pointer(layer, "layer");
  return layer->layer;
}

size_t checked_expert(const ktt::Layer& layer, int32_t expert) {
  return checked("expert", expert, 0, static_cast<int32_t>(layer.shape().num_experts) - 1);
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
        ktt::checked_shape(num_experts, hidden_size, intermediate_size, weight_format, group_size);
    const auto mode = static_cast<ktt::Activation>(
        checked("activation", activation, KTT_ACTIVATION_FLOAT32, KTT_ACTIVATION_INT8));
    const auto limits = ktt::checked_limits(max_tokens, max_top_k);
    *layer = new ktt_layer{ktt::Layer(pool->engine, shape, mode, limits)};
  });
}

int32_t ktt_layer_destroy(ktt_layer* layer) {
  return guarded([&] { delete layer; });
}

int32_t ktt_layer_set_expert(ktt_layer* layer, int32_t expert, const ktt_expert* source) {
  return guarded([&] {
    ktt::Layer& experts = checked_layer(layer);
    const size_t index = checked_expert(experts, expert);
    ktt::check_expert(experts.shape(), source);
    experts.set_expert(index, {source->gate, source->up, source->down, source->gate_scale,
                               source->up_scale, source->down_scale});
  });
}

int32_t ktt_layer_get_expert(ktt_layer* layer, int32_t expert, const ktt_expert* target) {
  return guarded([&] {
    ktt::Layer& experts = checked_layer(layer);
    const size_t index = checked_expert(experts, expert);
    ktt::check_expert(experts.shape(), target);
    experts.get_expert(index, {target->gate, target->up, target->down, target->gate_scale,
                               target->up_scale, target->down_scale});
  });
}

int32_t ktt_layer_clear_expert(ktt_layer* layer, int32_t expert) {
  return guarded([&] {
    ktt::Layer& experts = checked_layer(layer);
    experts.clear_expert(checked_expert(experts, expert));
  });
}

int32_t ktt_layer_forward(ktt_layer* layer, const ktt_forward* args) {
  return guarded([&] {
    ktt::Layer& experts = checked_layer(layer);
    experts.forward(ktt::checked_forward(experts, args));
  });
}

int32_t ktt_job_create(ktt_layer* layer, const ktt_forward* args, const int32_t* num_tokens,
                       const uint32_t* ready, uint32_t* done, ktt_job** job) {
  return guarded([&] {
    require_pointer(job, "job");
    ktt::Layer& experts = checked_layer(layer);
    const auto checked_args = ktt::checked_forward(experts, args);
    *job = new ktt_job{ktt::Job(experts, checked_args, num_tokens, ready, done)};
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
