// One MoE layer's routed experts: groups tokens by expert and drives the kernels over the pool.
//
// A forward is two parallel regions (three when the pool has several parts, plus one to convert
// activations when there are many): gate, up and activation function for each expert; then for
// each block of output columns, down and the weighted sum over all experts, in order of their ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "grouping.h"
#include "pool.h"
#include "scratch.h"
#include "weights.h"

namespace ktt {

// What one forward is given; sizes were checked at the wall, ids are checked here.
struct ForwardArgs {
  Choices choices;
  Dtype dtype;    // of x and out
  const void* x;  // [num_tokens, hidden]
  void* out;      // [num_tokens, hidden]
};

struct LayerLimits {
  size_t max_tokens;
  size_t max_top_k;
};

// A pool with the kernels its layers use; shared by them.
struct Engine {
  Engine(const PoolOptions& options, Dispatch chosen)
      : pool(options), dispatch(chosen), scratch(pool) {}

  Pool pool;
  Dispatch dispatch;
  Scratch scratch;
};

class Layer {
 public:
  Layer(std::shared_ptr<Engine> engine, const LayerShape& shape, Dtype activation,
        LayerLimits limits);

  ~Layer();  // waits for a forward under way
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  const LayerShape& shape() const { return shape_; }
  const LayerLimits& limits() const { return limits_; }
  size_t num_bytes() const;

  // Throws Error when a weight is not a number; the expert is then as it was.
  void set_expert(size_t expert, const ExpertSource& source);
  void forward(const ForwardArgs& args);

 private:
  class Run;  // one forward under way
  Scratch::Need scratch_need() const;

  std::shared_ptr<Engine> engine_;
  LayerShape shape_;
  LayerLimits limits_;
  ActivationKernels kernels_;
  std::vector<ExpertSlice> slices_;  // [part]
  std::vector<bool> is_set_;         // [num_experts]
  size_t num_set_ = 0;
};

}  // namespace ktt
