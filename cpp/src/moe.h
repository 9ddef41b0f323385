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
#include "memory.h"
#include "pool.h"
#include "weights.h"

namespace ktt {

// What one forward is given; sizes were checked at the wall, ids are checked here.
struct ForwardArgs {
  size_t num_tokens;
  size_t top_k;
  const int32_t* ids;    // [num_tokens, top_k], -1 is skipped
  const float* weights;  // [num_tokens, top_k]
  Dtype dtype;           // of x and out
  const void* x;         // [num_tokens, hidden]
  void* out;             // [num_tokens, hidden]
};

struct LayerLimits {
  size_t max_tokens;
  size_t max_top_k;
};

// Tokens grouped by expert. A position is one (token, k) that is computed here; the positions of
// an expert are neighbours, in order of their tokens.
struct Grouping {
  std::vector<uint32_t> first;     // [num_experts + 1]: an expert's first position
  std::vector<uint32_t> token_of;  // [positions]
  std::vector<float> weight_of;    // [positions]
  std::vector<uint32_t> next;      // [num_experts], while positions are dealt out
  std::vector<uint32_t> by_id;     // active experts, ascending
  std::vector<uint32_t> by_load;   // active experts, most positions first
  std::vector<size_t> chunk_end;   // row chunks up to and with by_load[i]

  size_t num_positions(size_t expert) const { return first[expert + 1] - first[expert]; }
};

// What forwards of all layers of a pool need besides weights; sized when layers are created, so
// that a forward allocates nothing. Guarded by the pool's lock.
class Scratch {
 public:
  struct Need {
    size_t num_experts, positions, operand_bytes, gathered_bytes;
    std::vector<size_t> part_activation_bytes;  // [part]
    size_t totals_bytes;
  };
  Scratch(const Pool& pool);
  void reserve(const Pool& pool, const Need& need);

  Grouping grouping;
  std::vector<size_t> counts;           // [part]: tasks of the next region
  std::vector<const void*> input_rows;  // [positions]: operands of gate/up
  Buffer operands;                      // [tokens, hidden]
  Buffer gathered;                      // [positions + padding, hidden]
  struct Part {
    Buffer activation;                   // [positions + padding, width of the slice]
    Buffer totals;                       // [panels of hidden][tokens][kPanelColumns] fp32
    std::vector<const void*> down_rows;  // [positions]
  };
  std::vector<Part> parts;
  struct Worker {
    alignas(kCacheLine) float sums[kMaxPanelRows * kPanelColumns];
    alignas(kCacheLine) uint16_t decode[kDecodeElements];
  };
  std::vector<std::unique_ptr<Worker>> workers;
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

  const LayerShape& shape() const { return shape_; }
  const LayerLimits& limits() const { return limits_; }
  size_t num_bytes() const;

  // Throws Error when a weight is not a number; the expert is then as it was.
  void set_expert(size_t expert, const ExpertSource& source);
  void forward(const ForwardArgs& args);

 private:
  class Run;  // one forward under way

  std::shared_ptr<Engine> engine_;
  LayerShape shape_;
  LayerLimits limits_;
  ActivationKernels kernels_;
  std::vector<ExpertSlice> slices_;  // [part]
  std::vector<bool> is_set_;         // [num_experts]
  size_t num_set_ = 0;
};

}  // namespace ktt
