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

// What goes on in even shares between the steps of a stage: the next one is made ready, the one
// after it is fetched from memory. Either may be missing.
template <class Stage>
class Preparation {
 public:
  Preparation(Stage* next, Stage* after, size_t num_turns)
      : next_(next),
        after_(after),
        num_to_ready_(next == nullptr ? 0 : next->num_tiles()),
        num_to_fetch_(after == nullptr ? 0 : after->num_tiles()),
        num_tiles_(num_to_ready_ > num_to_fetch_ ? num_to_ready_ : num_to_fetch_),
        num_turns_(num_turns) {}

  void take_turn() {
    for (due_ += num_tiles_; due_ >= num_turns_; due_ -= num_turns_, ++num_done_) {
      if (num_done_ < num_to_fetch_) after_->fetch_next();
      if (num_done_ < num_to_ready_) next_->ready_next();
    }
  }

 private:
  Stage* next_;
  Stage* after_;
  size_t num_to_ready_;
  size_t num_to_fetch_;
  size_t num_tiles_;
  size_t num_turns_;
  size_t num_done_ = 0;
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

template <class Stage>
struct Stages {
  Stage* now;
  Stage* next;   // null at the end
  Stage* after;  // as well
};

// One stage times all rows.
template <class Stage, size_t kPanels>
class Pass {
 public:
  Pass(const BlockTask& task, const Stages<Stage>& stages, Workspace& workspace)
      : task_(task),
        stage_(*stages.now),
        workspace_(workspace),
        preparation_(stages.next, stages.after, num_blocks(task) * stage_.num_steps()) {}

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
            rows_from(row)};
  }

  const BlockTask& task_;
  const Stage& stage_;
  Workspace& workspace_;
  Preparation<Stage> preparation_;
  Adder fold_;
  bool is_odd_ = false;
};

// Rows that stay in the second cache are best met by one pair of panels after the other, each read
// from end to end. More rows than that pass once for all panels of the call, stage by stage.
inline constexpr size_t kOperandsInCache = 1 << 20;

// Plans what follows a stage; false at the end.
template <class Stage>
inline bool plan_next(const BlockTask& task, const Stage& stage, Stage& next) {
  constexpr size_t kElementBytes = Stage::Tiles::kElementBytes;
  const bool by_depth = task.num_rows * task.depth.size * kElementBytes > kOperandsInCache;
  const size_t next_panel = stage.panel() + stage.num_panels();
  const bool is_last_panel = next_panel == task.num_panels;
  const bool is_last_depth = stage.end() == task.depth.size;
  if (is_last_panel && is_last_depth) return false;
  // Two stages are decoded at a time.
  std::byte* decoded = task.decode + (stage.decoded() == task.decode ? kStageDecodeBytes : 0);
  if (by_depth ? is_last_panel : !is_last_depth) {
    next.plan(task, by_depth ? 0 : stage.panel(), stage.end(), decoded);
  } else {
    next.plan(task, next_panel, by_depth ? stage.position() : 0, decoded);
  }
  return true;
}

template <class Stage>
inline void fetch(Stage& stage) {
  for (size_t i = 0; i < stage.num_tiles(); ++i) stage.fetch_next();
}
template <class Stage>
inline void make_ready(Stage& stage) {
  for (size_t i = 0; i < stage.num_tiles(); ++i) stage.ready_next();
}

template <class Tiles, class Format>
void multiply_tiles(const BlockTask& task) {
  using ThisStage = Stage<Tiles, Format>;
  Workspace workspace;
  ThisStage ring[3];
  clear_sums<IsaAvx512>(task);
  ring[0].plan(task, 0, 0, task.decode);
  const bool has_second = plan_next(task, ring[0], ring[1]);
  fetch(ring[0]);
  if (has_second) fetch(ring[1]);
  make_ready(ring[0]);
  Stages<ThisStage> stages{&ring[0], has_second ? &ring[1] : nullptr, nullptr};
  for (ThisStage* spare = &ring[2]; stages.now != nullptr;) {
    const bool has_after = stages.next != nullptr && plan_next(task, *stages.next, *spare);
    stages.after = has_after ? spare : nullptr;
    if (stages.now->num_panels() == 2) {
      Pass<ThisStage, 2>(task, stages, workspace).run();
    } else {
      Pass<ThisStage, 1>(task, stages, workspace).run();
    }
    spare = stages.now;
    stages.now = stages.next;
    stages.next = stages.after;
  }
}

}  // namespace
}  // namespace ktt
