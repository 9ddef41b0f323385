// One MoE layer's routed experts: their weights, in a slice for each part of the pool, and the
// forwards over them (see run.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <vector>

#include "dispatch.h"
#include "grouping.h"
#include "job.h"
#include "pool.h"
#include "scratch.h"
#include "weights.h"

namespace ktt {

// What one forward is given; sizes were checked at the wall, ids are checked here.
struct ForwardArgs {
  Choices choices;
  Dtype dtype;      // of x and out
  const void* x;    // [num_tokens, hidden]
  void* out;        // [num_tokens, hidden]
  bool accumulate;  // add to what is in `out`
};

struct LayerLimits {
  size_t max_tokens;
  size_t max_top_k;
};

// Up to so many bytes the products of down are kept until all experts have theirs, so that a thread
// reads an expert's weights in long stretches; beyond, experts are added up one after the other.
inline constexpr size_t kProductBytes = size_t{256} << 20;

// A pool with the kernels its layers use; shared by them.
struct Engine {
  Engine(const PoolOptions& options, Dispatch chosen, size_t max_product_bytes = kProductBytes)
      : pool(options),
        dispatch(chosen),
        product_bytes(max_product_bytes),
        scratch(pool),
        jobs(pool) {}

  Pool pool;
  Dispatch dispatch;
  size_t product_bytes;
  Scratch scratch;
  JobQueue jobs;
};

class Layer {
 public:
  // Throws Error when the instruction set has no kernels for the format in this activation mode.
  Layer(std::shared_ptr<Engine> engine, const LayerShape& shape, Activation activation,
        LayerLimits limits);

  ~Layer();  // waits for a forward under way, and for whoever reads an expert
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  const LayerShape& shape() const { return shape_; }
  const LayerLimits& limits() const { return limits_; }
  JobQueue& jobs() const { return engine_->jobs; }
  size_t num_bytes() const;

  // Throws Error when a weight or scale is refused; the expert then counts as not set.
  void set_expert(size_t expert, const ExpertSource& source);
  // On the calling thread alone, beside forwards and other callers: whoever reads many experts does
  // not hold up a forward. Throws Error when the expert is not set.
  void get_expert(size_t expert, const ExpertTarget& target) const;
  void clear_expert(size_t expert);

  void forward(const ForwardArgs& args);

 private:
  class Run;  // one forward under way
  Scratch::Need scratch_need() const;
  void unset(size_t expert);
  void release(size_t expert);
  Depth input_depth() const { return {shape_.hidden_size, 0, shape_.group}; }

  std::shared_ptr<Engine> engine_;
  LayerShape shape_;
  LayerLimits limits_;
  ActivationKernels kernels_;
  std::vector<ExpertSlice> slices_;     // [part]
  std::vector<size_t> activation_row_;  // [part]: bytes of a row of down's operands
  // Whoever changes weights, or which experts are set, holds this and the pool; whoever reads them
  // holds one of both.
  mutable std::shared_mutex weights_;
  std::vector<bool> is_set_;  // [num_experts]
  size_t num_set_ = 0;
};

}  // namespace ktt
