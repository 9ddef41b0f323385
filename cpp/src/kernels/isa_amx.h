// AMX: every product of rows and panels with tiles, whatever the number of rows. A tile multiply
// takes the same 16 cycles for 1 row as for 16 and reads weights at 64 bytes a cycle, several times
// what memory gives: few rows wait for memory with tiles as they would with vectors, and one way of
// computing means one result.
//
// Sixteen rows times two panels make a block:
//
//   sums      tiles 0-3: 16 rows x 64 columns
//   operands  tile 4: 16 rows x 64 bytes, read once for the stage and not again
//   weights   tiles 5-7 in turn, from the first cache, where a stage of them stays for all rows
//
// That is five loads of 8 cycles for four multiplies of 16. Blocks of 32 rows x 32 columns would do
// with four, but read twice the operands for the same work, 32 bytes a cycle from the second cache.
//
// Scaling the sums is nearly as much work for the vector units as multiplying is for the tiles, so
// both run at once: while a span is multiplied, the span before it is added up and the next stage's
// weights are decoded or fetched.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "amx_fold.h"
#include "amx_stage.h"
#include "amx_tiles.h"
#include "kernel_table.h"

namespace ktt {
namespace {

// A block whose rows do not lie behind one another, or are fewer than a tile has, is gathered by
// the kernel for each stage: a copy of 64 bytes for each row and step. That is at most 16 copies in
// the 64 cycles of a step, and where there are so few rows the step waits some 500 cycles for its
// weights anyway. With more rows than a block the wait is shared, and copying them once pays.
inline constexpr size_t kMinTileRows = kTileRows + 1;

// Memory of one call, all of it in the first cache.
struct Workspace {
  alignas(64) float sums[2][kSpanGroups * kTileRows * kMaxTilesAcross * kTileColumns];
  alignas(64) std::byte rows[kMaxSteps * kTileBytes] = {};
};

// Readies the next stage in even shares between the steps of this one.
template <class Stage>
class Preparation {
 public:
  Preparation(Stage* next, size_t num_turns)
      : next_(next), num_tiles_(next == nullptr ? 0 : next->num_tiles()), num_turns_(num_turns) {}

  void take_turn() {
    for (due_ += num_tiles_; due_ >= num_turns_; due_ -= num_turns_)
      next_->ready_tile(num_ready_++);
  }

 private:
  Stage* next_;
  size_t num_tiles_;
  size_t num_turns_;
  size_t num_ready_ = 0;
  size_t due_ = 0;  // in parts of a tile, num_turns_ to one
};

template <size_t kPanels>
inline void zero_sums() {
  tiles::zero<0>();
  tiles::zero<1>();
  if constexpr (kPanels == 2) {
    tiles::zero<2>();
    tiles::zero<3>();
  }
}

template <size_t kPanels>
inline void store_sums(float* to) {
  constexpr size_t kStride = kPanels * kPanelColumns * sizeof(float);
  tiles::store<0>(to, kStride);
  tiles::store<1>(to + kTileColumns, kStride);
  if constexpr (kPanels == 2) {
    tiles::store<2>(to + 2 * kTileColumns, kStride);
    tiles::store<3>(to + 3 * kTileColumns, kStride);
  }
}

template <class Tiles, size_t kPanels>
inline void multiply_step(const std::byte* rows, size_t stride, const std::byte* const* weights) {
  tiles::load<4>(rows, stride);
  tiles::load<5>(weights[0], kTileBytesPerRow);
  Tiles::template multiply<0, 4, 5>();
  tiles::load<6>(weights[1], kTileBytesPerRow);
  Tiles::template multiply<1, 4, 6>();
  if constexpr (kPanels == 2) {
    tiles::load<7>(weights[2], kTileBytesPerRow);
    Tiles::template multiply<2, 4, 7>();
    tiles::load<5>(weights[3], kTileBytesPerRow);
    Tiles::template multiply<3, 4, 5>();
  }
}

// One stage times all rows.
template <class Stage, size_t kPanels>
class Pass {
 public:
  Pass(const BlockTask& task, const Stage& stage, Stage* next, Workspace& workspace)
      : task_(task),
        stage_(stage),
        workspace_(workspace),
        preparation_(next, num_blocks(task) * stage.num_steps()) {}

  void run() {
    for (size_t row = 0; row < task_.num_rows; row += kTileRows) {
      if (is_gathered(row)) gather(row);
      for (size_t group = 0; group < stage_.num_groups(); group += kSpanGroups) {
        multiply_span(row, group);
      }
    }
    fold_.advance(kTileRows);
  }

 private:
  using Tiles = typename Stage::Tiles;
  using Adder = Fold<Tiles, kPanels>;

  static size_t num_blocks(const BlockTask& task) {
    return (task.num_rows + kTileRows - 1) / kTileRows;
  }

  size_t rows_from(size_t row) const {
    const size_t left = task_.num_rows - row;
    return left < kTileRows ? left : kTileRows;
  }

  bool is_gathered(size_t row) const { return task_.row_stride == 0 || rows_from(row) < kTileRows; }

  // Tiles of operands as they are loaded; rows past the last one keep what they held.
  void gather(size_t row) {
    for (size_t r = 0; r < rows_from(row); ++r) {
      const auto* from = static_cast<const std::byte*>(task_.rows[row + r]);
      for (size_t s = 0; s < stage_.num_steps(); ++s) {
        store_row(workspace_.rows + s * kTileBytes + r * kTileBytesPerRow,
                  load_row(from + stage_.step(s).position * Tiles::kElementBytes));
      }
    }
  }

  void multiply_span(size_t row, size_t first) {
    const size_t left = stage_.num_groups() - first;
    const size_t num_groups = left < kSpanGroups ? left : kSpanGroups;
    float* sums = workspace_.sums[is_odd_ ? 1 : 0];
    size_t step = first == 0 ? 0 : stage_.group(first - 1).end;
    const size_t num_steps = stage_.group(first + num_groups - 1).end - step;
    const size_t share = (fold_.rows_left() + num_steps - 1) / num_steps;
    for (size_t g = 0; g < num_groups; ++g) {
      zero_sums<kPanels>();
      for (; step < stage_.group(first + g).end; ++step) {
        multiply(row, step);
        fold_.advance(share);
        preparation_.take_turn();
      }
      store_sums<kPanels>(sums + g * Adder::kGroupFloats);
    }
    fold_.begin(span(row, first, num_groups, sums));
    is_odd_ = !is_odd_;
  }

  void multiply(size_t row, size_t index) {
    const auto& step = stage_.step(index);
    if (is_gathered(row)) {
      const std::byte* rows = workspace_.rows + index * kTileBytes;
      multiply_step<Tiles, kPanels>(rows, kTileBytesPerRow, step.tile);
      return;
    }
    const size_t stride = task_.row_stride;
    const auto* rows =
        static_cast<const std::byte*>(task_.rows[row]) + step.position * Tiles::kElementBytes;
    multiply_step<Tiles, kPanels>(rows, stride, step.tile);
    if (row + kTileRows < task_.num_rows) prefetch_rows(rows + kTileRows * stride);
  }

  // The next block's: a few lines of each of many rows, which the processor does not foresee.
  void prefetch_rows(const std::byte* rows) const {
    for (size_t r = 0; r < kTileRows; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(rows + r * task_.row_stride), _MM_HINT_T0);
    }
  }

  Span span(size_t row, size_t first, size_t num_groups, const float* sums) const {
    const size_t scale = (stage_.first_group() + first) * sizeof(float);
    const size_t panel_stride = task_.num_rows * kPanelColumns;
    return {sums,
            &stage_.group(first),
            num_groups,
            task_.rows + row,
            Tiles::kRowScales ? Int8Row::scales_offset(task_.depth) + scale : 0,
            task_.sums + stage_.panel() * panel_stride + row * kPanelColumns,
            panel_stride,
            rows_from(row),
            stage_.position() == 0 && first == 0};
  }

  const BlockTask& task_;
  const Stage& stage_;
  Workspace& workspace_;
  Preparation<Stage> preparation_;
  Adder fold_;
  bool is_odd_ = false;
};

template <class Stage>
inline void multiply_stage(const BlockTask& task, const Stage& stage, Stage* next,
                           Workspace& workspace) {
  if (stage.num_panels() == 2) {
    Pass<Stage, 2>(task, stage, next, workspace).run();
  } else {
    Pass<Stage, 1>(task, stage, next, workspace).run();
  }
}

// Plans what follows a stage: the same panels' next depths, else the next panels. False at the end.
template <class Stage>
inline bool plan_next(const BlockTask& task, const Stage& stage, Stage& next) {
  if (stage.end() < task.depth.size) {
    next.plan(task, stage.panel(), stage.end());
    return true;
  }
  const size_t panel = stage.panel() + stage.num_panels();
  if (panel == task.num_panels) return false;
  next.plan(task, panel, 0);
  return true;
}

template <class Tiles, class Format>
void multiply_tiles(const BlockTask& task) {
  using ThisStage = Stage<Tiles, Format>;
  Workspace workspace;
  ThisStage first(task.decode);
  ThisStage second(task.decode + kStageDecodeBytes);
  ThisStage* stage = &first;
  ThisStage* next = &second;
  stage->plan(task, 0, 0);
  stage->ready_all();
  while (plan_next(task, *stage, *next)) {
    multiply_stage(task, *stage, next, workspace);
    ThisStage* const done = stage;
    stage = next;
    next = done;
  }
  multiply_stage<ThisStage>(task, *stage, nullptr, workspace);
}

}  // namespace
}  // namespace ktt
