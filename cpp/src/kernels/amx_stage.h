// A stage: as much of one or two neighbouring panels as stays in the first cache while all rows
// pass, laid out as the list of tiles to multiply with. While one stage is multiplied the next one
// is made ready tile by tile, and the one after it is fetched from memory.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "amx_tiles.h"
#include "gemm.h"
#include "isa_avx512.h"
#include "kernel_table.h"

namespace ktt {
namespace {

inline constexpr size_t kTileRows = 16;
inline constexpr size_t kTileBytes = kTileRows * kTileBytesPerRow;
inline constexpr size_t kTilesOfPanel = 2;
inline constexpr size_t kMaxTilesAcross = 2 * kTilesOfPanel;

// The weights of a stage take at most 32 KiB of the first cache's 48, leaving room for the rows and
// sums that stream by: eight steps where they are multiplied as they lie, four where they are
// decoded, for then the next stage's are there as well.
inline constexpr size_t kMaxSteps = 8;
inline constexpr size_t kMaxDecodedSteps = 4;
inline constexpr size_t kStageDecodeBytes = kMaxDecodedSteps * kMaxTilesAcross * kTileBytes;
static_assert(2 * kStageDecodeBytes == kDecodeBytes);

inline __m512i load_row(const std::byte* from) { return _mm512_loadu_si512(from); }
inline void store_row(std::byte* to, __m512i row) { _mm512_store_si512(to, row); }

// Operands in bfloat16: 32 of depth in a tile, sums in fp32.
struct PairTiles {
  static constexpr size_t kDepth = 32;
  static constexpr size_t kElementBytes = 2;
  static constexpr bool kRowScales = false;
  static constexpr WeightFormat kAsItLies = WeightFormat::kBf16;

  // A unit of weights to rows of pairs.
  template <class Format>
  static inline void decode(const std::byte* unit, std::byte* to) {
    typename Format::template Pairs<IsaAvx512> reader(unit);
    unroll<kUnitDepth / 2>([&](auto row) __attribute__((always_inline)) {
      store_row(to + decltype(row)::value * kRowBytes, reader.row(row));
    });
  }
  template <int kC, int kA, int kB>
  static inline void multiply() {
    tiles::multiply_pairs<kC, kA, kB>();
  }
  static inline __m512 sums(const float* part) { return _mm512_load_ps(part); }
};

// Operands in int8 with scales: 64 of depth in a tile, sums in int32.
struct QuadTiles {
  static constexpr size_t kDepth = 64;
  static constexpr size_t kElementBytes = 1;
  static constexpr bool kRowScales = true;
  static constexpr WeightFormat kAsItLies = WeightFormat::kInt8;

  // A unit of weights to rows of quads, without the offset that unsigned products ask for.
  template <class Format>
  static inline void decode(const std::byte* unit, std::byte* to) {
    typename Format::template Quads<IsaAvx512> reader(unit);
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(Format::kOffset));
    unroll<kUnitDepth / 4>([&](auto row) __attribute__((always_inline)) {
      store_row(to + decltype(row)::value * kRowBytes, _mm512_sub_epi8(reader.row(row), offset));
    });
  }
  template <int kC, int kA, int kB>
  static inline void multiply() {
    tiles::multiply_quads<kC, kA, kB>();
  }
  static inline __m512 sums(const float* part) {
    return _mm512_cvtepi32_ps(_mm512_load_si512(part));
  }
};

// One tile's depth of every tile across.
struct Step {
  const std::byte* packed[kMaxTilesAcross];
  const std::byte* tile[kMaxTilesAcross];  // what is multiplied with
  std::byte* decoded;                      // the tiles, null where packed weights already are
  size_t position;                         // in the slice's depth
  size_t depth;                            // less than a whole tile's at a group's end
};

// Steps whose sums are scaled together.
struct StageGroup {
  size_t end;  // past its last step
  alignas(64) float scales[kMaxTilesAcross * kTileColumns];
};

template <class Tiles_, class Format>
class Stage {
 public:
  using Tiles = Tiles_;

  // Takes as many whole groups from `position` of a panel's depth on as there is room for, so that
  // what is summed before it is scaled depends on nothing but the slice's depth.
  void plan(const BlockTask& task, size_t panel, size_t position, std::byte* decoded) {
    decoded_ = decoded;
    panel_ = panel;
    position_ = position;
    num_panels_ = task.num_panels - panel > 1 ? 2 : 1;
    num_steps_ = num_decoded_ = num_groups_ = 0;
    fetched_ = readied_ = {};
    const size_t at = task.depth.begin + position;  // in the uncut depth
    size_t end = position + task.depth.group - at % task.depth.group;
    first_group_ = at / task.depth.group - task.depth.begin / task.depth.group;
    for (size_t group = first_group_; position < task.depth.size; ++group) {
      end = least(end, task.depth.size);
      if (!has_room(end - position)) break;
      add_group(task, group, position, end);
      position = end;
      end += task.depth.group;
    }
    end_ = position;
  }

  // To be called num_tiles() times: fetches a tile's weights from memory.
  void fetch_next() {
    const Step& step = steps_[fetched_.step];
    const std::byte* from = step.packed[fetched_.across];
    for (size_t at = 0; at < weight_bytes(kFormat, step.depth * kTileColumns); at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T1);
    }
    advance(fetched_);
  }

  // As many times, before the stage is multiplied: decodes a tile if need be.
  void ready_next() {
    if constexpr (kIsDecoded || kHasShortSteps) {
      const Step& step = steps_[readied_.step];
      if (step.decoded != nullptr) {
        decode_tile(step.packed[readied_.across], step.depth,
                    step.decoded + readied_.across * kTileBytes);
      }
      advance(readied_);
    }
  }

  size_t num_tiles() const { return num_steps_ * num_panels_ * kTilesOfPanel; }
  size_t num_steps() const { return num_steps_; }
  const Step& step(size_t i) const { return steps_[i]; }
  size_t num_groups() const { return num_groups_; }
  const StageGroup& group(size_t i) const { return groups_[i]; }
  size_t first_group() const { return first_group_; }  // among the slice's groups
  size_t panel() const { return panel_; }
  std::byte* decoded() const { return decoded_; }
  size_t num_panels() const { return num_panels_; }
  size_t position() const { return position_; }
  size_t end() const { return end_; }

 private:
  static constexpr WeightFormat kFormat = Format::kFormat;
  static constexpr bool kIsDecoded = kFormat != Tiles::kAsItLies;
  static constexpr bool kHasShortSteps = Tiles::kDepth > kStepDepth;

  static size_t least(size_t a, size_t b) { return a < b ? a : b; }

  // Tile by tile across, each over all steps: near to the order of memory.
  struct Cursor {
    size_t across;
    size_t step;
  };
  void advance(Cursor& cursor) const {
    if (++cursor.step == num_steps_) cursor = {cursor.across + 1, 0};
  }

  bool has_room(size_t depth) const {
    const size_t steps = (depth + Tiles::kDepth - 1) / Tiles::kDepth;
    const size_t decoded = kIsDecoded ? steps : steps - depth / Tiles::kDepth;
    return num_steps_ + steps <= kMaxSteps && num_decoded_ + decoded <= kMaxDecodedSteps;
  }

  void add_group(const BlockTask& task, size_t index, size_t position, size_t end) {
    while (position < end) {
      add_step(task, position, least(Tiles::kDepth, end - position));
      position += Tiles::kDepth;
    }
    // Without scales the whole stage is one group.
    const bool is_scaled = traits(kFormat).scales != Scales::kNone;
    if (is_scaled || num_groups_ == 0) add_scales(task, index);
    groups_[num_groups_ - 1].end = num_steps_;
  }

  void add_scales(const BlockTask& task, size_t index) {
    float* to = groups_[num_groups_++].scales;
    for (size_t t = 0; t < num_panels_ * kTilesOfPanel; ++t, to += kTileColumns) {
      const std::byte* scales = task.scales + (panel_ + t / kTilesOfPanel) * task.panel_scale_bytes;
      const size_t column = t % kTilesOfPanel * kTileColumns;
      _mm512_store_ps(to, weight_scale<IsaAvx512, Format>(scales, index, column));
    }
  }

  void add_step(const BlockTask& task, size_t position, size_t depth) {
    Step& step = steps_[num_steps_++];
    step.position = position;
    step.depth = depth;
    step.decoded = nullptr;
    if (kIsDecoded || depth < Tiles::kDepth) {
      step.decoded = decoded_ + num_decoded_++ * kMaxTilesAcross * kTileBytes;
    }
    const size_t in_chunk = (task.depth.begin + position) % kChunkDepth;
    const size_t chunk_begin = position - least(position, in_chunk);  // the first may be cut
    const size_t chunk_end = least(position + (kChunkDepth - in_chunk), task.depth.size);
    const size_t tile_bytes = weight_bytes(kFormat, (chunk_end - chunk_begin) * kTileColumns);
    const size_t before = chunk_begin * kPanelColumns + (position - chunk_begin) * kTileColumns;
    const std::byte* packed =
        task.weights + panel_ * task.panel_bytes + weight_bytes(kFormat, before);
    for (size_t t = 0; t < num_panels_ * kTilesOfPanel; ++t) {
      step.packed[t] =
          packed + t / kTilesOfPanel * task.panel_bytes + t % kTilesOfPanel * tile_bytes;
      step.tile[t] = step.decoded == nullptr ? step.packed[t] : step.decoded + t * kTileBytes;
    }
  }

  static void decode_tile(const std::byte* from, size_t depth, std::byte* to) {
    constexpr size_t kFrom = weight_bytes(kFormat, kUnitDepth * kTileColumns);
    constexpr size_t kTo = kUnitDepth * kTileColumns * Tiles::kElementBytes;
    size_t d = 0;
    for (; d < depth; d += kUnitDepth, from += kFrom, to += kTo) {
      Tiles::template decode<Format>(from, to);
    }
    for (; d < Tiles::kDepth; d += kUnitDepth, to += kTo) {
      for (size_t row = 0; row < kTo; row += kRowBytes) store_row(to + row, _mm512_setzero_si512());
    }
  }

  std::byte* decoded_;
  size_t panel_, num_panels_;
  size_t position_, end_;
  size_t first_group_;
  size_t num_steps_, num_decoded_, num_groups_;
  Cursor fetched_, readied_;
  Step steps_[kMaxSteps];
  StageGroup groups_[kMaxSteps];
};

}  // namespace
}  // namespace ktt
