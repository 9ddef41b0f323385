// What forwards need besides weights, shared by all layers of a pool.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "grouping.h"
#include "kernels/kernel_table.h"
#include "memory.h"
#include "pool.h"
#include "schedule.h"

namespace ktt {

// A worker sums up the output columns of a task here, in what stays in its own cache: as many
// panels at once as have this many rows together, or one.
inline constexpr size_t kTotalsRows = 2048;
inline size_t panels_of_totals(size_t num_tokens) {
  return num_tokens < kTotalsRows ? kTotalsRows / num_tokens : 1;
}

// Sized when layers are created, so that a forward allocates nothing. Guarded by the pool's lock.
struct Scratch {
  struct PartNeed {
    size_t num_tasks;
    size_t values_bytes;
    size_t activation_bytes;
    size_t product_bytes;
    size_t totals_bytes;
  };
  struct Need {
    size_t num_experts = 0;
    size_t num_choices = 0;
    size_t num_output_panels = 0;
    size_t operand_bytes = 0;
    size_t gathered_bytes = 0;
    size_t worker_totals_bytes = 0;
    std::vector<PartNeed> parts;
  };
  struct Part {
    std::vector<PanelRange> tasks;  // of the running region
    // [chunks]: gate/up panels whose activations are not there yet, where they are quantised.
    std::unique_ptr<std::atomic<uint32_t>[]> open_panels;
    Buffer values;      // [positions, width of the slice] fp32, before they are quantised
    Buffer activation;  // [positions, width of the slice], operands of down
    Buffer products;    // [chunks][panels of hidden][rows of the chunk][kPanelColumns] fp32
    // [panels of hidden, or fewer]: chunks whose products are not there yet.
    std::unique_ptr<std::atomic<uint32_t>[]> open_chunks;
    Buffer totals;  // [panels of hidden][tokens][kPanelColumns] fp32, if there are other parts
  };
  struct Worker {
    const void* rows[kMaxRows];  // of the running kernel call
    Buffer memory;               // on the node of the worker's part
    float* sums;                 // [kMaxPanels][kMaxRows][kPanelColumns]
    std::byte* decode;           // kDecodeBytes
    float* totals;               // [panels of a task][tokens][kPanelColumns]
  };

  explicit Scratch(const Pool& pool);
  void reserve(const Need& need);

  Grouping grouping;
  std::vector<size_t> counts;  // [part]: tasks of the next region
  Buffer operands;             // [tokens, hidden]
  Buffer gathered;             // [positions, hidden], those that kernels want contiguous
  std::vector<Part> parts;
  std::vector<std::unique_ptr<Worker>> workers;

 private:
  void reserve_worker(size_t worker, size_t totals_bytes);

  const Pool& pool_;
  size_t num_chunks_ = 0;
  size_t num_output_panels_ = 0;
};

}  // namespace ktt
