#include "layout.h"

#include <immintrin.h>

namespace ktt {
namespace {

// In every format a tile's part of a chunk is a transposition: row r of 64 bytes holds the r-th
// four bytes of each of the 16 columns, four columns to a lane of 16 bytes. Formats differ only in
// how the bytes of such a lane are then arranged.
constexpr size_t kLaneColumns = 4;
constexpr size_t kWordBytes = 4;
constexpr size_t kLaneBytes = kLaneColumns * kWordBytes;
constexpr size_t kTileRowBytes = kTileColumns * kWordBytes;
constexpr size_t kCacheLine = 64;

struct ArrangeNothing {
  static __m128i pack(__m128i lane) { return lane; }
  static __m128i unpack(__m128i lane) { return lane; }
};

// Per column two pairs of depths: first the columns' first pairs, then their second ones.
struct ArrangePairs {
  static __m128i pack(__m128i lane) {
    return _mm_shuffle_epi8(lane,
                            _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  }
  static __m128i unpack(__m128i lane) {
    return _mm_shuffle_epi8(lane,
                            _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  }
};

// Quad order, its own inverse.
struct ArrangeQuads {
  static __m128i pack(__m128i lane) {
    return _mm_shuffle_epi8(lane,
                            _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  }
  static __m128i unpack(__m128i lane) { return pack(lane); }
};

// From depths 10 32 54 76 (a column's bytes, high half first) to 40 62 51 73: the high halves of
// the lower two bytes change places with the low halves of the upper two. Its own inverse.
struct ArrangeNibbles {
  static __m128i pack(__m128i lane) {
    const __m128i kept = _mm_and_si128(lane, _mm_set1_epi32(static_cast<int>(0xF0F00F0F)));
    const __m128i down = _mm_and_si128(_mm_srli_epi32(lane, 12), _mm_set1_epi32(0x0000F0F0));
    const __m128i up = _mm_and_si128(_mm_slli_epi32(lane, 12), _mm_set1_epi32(0x0F0F0000));
    return _mm_or_si128(kept, _mm_or_si128(down, up));
  }
  static __m128i unpack(__m128i lane) { return pack(lane); }
};

__m128i load(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
void store(std::byte* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

struct Square {
  __m128i row[4];
};

Square transposed(const Square& s) {
  const __m128i low01 = _mm_unpacklo_epi32(s.row[0], s.row[1]);
  const __m128i low23 = _mm_unpacklo_epi32(s.row[2], s.row[3]);
  const __m128i high01 = _mm_unpackhi_epi32(s.row[0], s.row[1]);
  const __m128i high23 = _mm_unpackhi_epi32(s.row[2], s.row[3]);
  return {{_mm_unpacklo_epi64(low01, low23), _mm_unpackhi_epi64(low01, low23),
           _mm_unpacklo_epi64(high01, high23), _mm_unpackhi_epi64(high01, high23)}};
}

Square load_square(const std::byte* from, size_t row_bytes) {
  return {
      {load(from), load(from + row_bytes), load(from + 2 * row_bytes), load(from + 3 * row_bytes)}};
}

// Asks for the same bytes of the rows' next chunk. A panel's 32 rows are more streams than
// processors foresee by themselves.
void prefetch_next_chunk(const std::byte* source, size_t row_bytes, size_t chunk_bytes) {
  for (size_t column = 0; column < kLaneColumns; ++column, source += row_bytes) {
    for (size_t at = 0; at < chunk_bytes; at += kCacheLine) {
      __builtin_prefetch(source + chunk_bytes + at);
    }
  }
}

// One tile's part of a chunk. Lane by lane, so that cache lines of four columns only are in use at
// once: checkpoints' rows lie a power of two apart and share few cache sets.
template <class Arrange>
void pack_tile(const std::byte* source, size_t row_bytes, size_t num_words, std::byte* tile) {
  for (size_t lane = 0; lane < kTileRowBytes; lane += kLaneBytes) {
    std::byte* to = tile + lane;
    prefetch_next_chunk(source, row_bytes, num_words * kWordBytes);
    for (size_t word = 0; word < num_words; word += kLaneColumns, to += 4 * kTileRowBytes) {
      const Square s = transposed(load_square(source + word * kWordBytes, row_bytes));
      for (size_t r = 0; r < 4; ++r) store(to + r * kTileRowBytes, Arrange::pack(s.row[r]));
    }
    source += kLaneColumns * row_bytes;
  }
}

template <class Arrange>
void unpack_tile(const std::byte* tile, size_t row_bytes, size_t num_words, std::byte* target) {
  for (size_t lane = 0; lane < kTileRowBytes; lane += kLaneBytes) {
    const std::byte* from = tile + lane;
    for (size_t word = 0; word < num_words; word += kLaneColumns, from += 4 * kTileRowBytes) {
      Square s = load_square(from, kTileRowBytes);
      for (__m128i& row : s.row) row = Arrange::unpack(row);
      s = transposed(s);
      std::byte* to = target + word * kWordBytes;
      for (size_t c = 0; c < kLaneColumns; ++c) store(to + c * row_bytes, s.row[c]);
    }
    target += kLaneColumns * row_bytes;
  }
}

// Calls fn(bytes of a source row before the chunk, bytes of it in the chunk) for every chunk.
template <class Fn>
void for_each_chunk(WeightFormat format, const Depth& depth, Fn fn) {
  for (size_t at = 0, end = depth.first_chunk(); at < depth.size; end += kChunkDepth) {
    const size_t next = end < depth.size ? end : depth.size;
    fn(weight_bytes(format, at), weight_bytes(format, next - at));
    at = next;
  }
}

template <class Arrange>
void pack_as(WeightFormat format, const PanelSource& source, const Depth& depth, void* panel) {
  auto* to = static_cast<std::byte*>(panel);
  for_each_chunk(format, depth, [&](size_t at, size_t chunk_bytes) {
    for (const void* tile : source.tile) {
      const auto* from = static_cast<const std::byte*>(tile) + at;
      pack_tile<Arrange>(from, source.row_bytes, chunk_bytes / kWordBytes, to);
      to += kTileColumns * chunk_bytes;
    }
  });
}

template <class Arrange>
void unpack_as(WeightFormat format, const void* panel, const Depth& depth,
               const PanelTarget& target) {
  const auto* from = static_cast<const std::byte*>(panel);
  for_each_chunk(format, depth, [&](size_t at, size_t chunk_bytes) {
    for (void* tile : target.tile) {
      auto* to = static_cast<std::byte*>(tile) + at;
      unpack_tile<Arrange>(from, target.row_bytes, chunk_bytes / kWordBytes, to);
      from += kTileColumns * chunk_bytes;
    }
  });
}

// Where a group of the depth begins in the uncut matrix, for a cut group before the cut.
size_t begin_of_group(const Depth& depth, size_t group) {
  return (depth.begin / depth.group + group) * depth.group;
}

// The scales of a panel: `rows` of each tile for every group.
template <class Scale, size_t kRows>
struct ScaleLayout {
  static void pack(const PanelSource& source, const Depth& depth, size_t source_group,
                   void* panel) {
    auto* to = static_cast<Scale*>(panel);
    for (size_t group = 0; group < depth.num_groups(); ++group) {
      const size_t column =
          begin_of_group(depth, group) / source_group - depth.begin / source_group;
      for (const void* tile : source.tile) {
        const auto* from = static_cast<const std::byte*>(tile);
        for (size_t row = 0; row < kRows; ++row, from += source.row_bytes) {
          *to++ = reinterpret_cast<const Scale*>(from)[column];
        }
      }
    }
  }

  static void unpack(const void* panel, const Depth& depth, size_t target_group,
                     const PanelTarget& target) {
    const auto* from = static_cast<const Scale*>(panel);
    for (size_t group = 0; group < depth.num_groups(); ++group, from += 2 * kRows) {
      const size_t begin = begin_of_group(depth, group);
      if (begin < depth.begin || begin % target_group != 0) continue;
      const size_t column = begin / target_group - depth.begin / target_group;
      for (size_t i = 0; i < 2 * kRows; ++i) {
        auto* to = static_cast<std::byte*>(target.tile[i / kRows]) + i % kRows * target.row_bytes;
        reinterpret_cast<Scale*>(to)[column] = from[i];
      }
    }
  }
};

using SquareScales = ScaleLayout<float, 1>;
using GroupScales = ScaleLayout<uint16_t, kTileColumns>;

}  // namespace

size_t panel_bytes(WeightFormat format, size_t depth) {
  return weight_bytes(format, kPanelColumns * depth);
}

void pack_panel(WeightFormat format, const PanelSource& source, const Depth& depth, void* panel) {
  switch (format) {
    case WeightFormat::kBf16:
      return pack_as<ArrangeNothing>(format, source, depth, panel);
    case WeightFormat::kFp8:
      return pack_as<ArrangePairs>(format, source, depth, panel);
    case WeightFormat::kInt8:
      return pack_as<ArrangeQuads>(format, source, depth, panel);
    case WeightFormat::kInt4:
      return pack_as<ArrangeNibbles>(format, source, depth, panel);
  }
}

void unpack_panel(WeightFormat format, const void* panel, const Depth& depth,
                  const PanelTarget& target) {
  switch (format) {
    case WeightFormat::kBf16:
      return unpack_as<ArrangeNothing>(format, panel, depth, target);
    case WeightFormat::kFp8:
      return unpack_as<ArrangePairs>(format, panel, depth, target);
    case WeightFormat::kInt8:
      return unpack_as<ArrangeQuads>(format, panel, depth, target);
    case WeightFormat::kInt4:
      return unpack_as<ArrangeNibbles>(format, panel, depth, target);
  }
}

size_t panel_scale_bytes(WeightFormat format, const Depth& depth) {
  return depth.num_groups() * 2 * scale_rows(format) * traits(format).scale_bytes;
}

void pack_scales(WeightFormat format, const PanelSource& source, const Depth& depth,
                 size_t source_group, void* panel) {
  switch (traits(format).scales) {
    case Scales::kNone:
      return;
    case Scales::kSquares:
      return SquareScales::pack(source, depth, source_group, panel);
    case Scales::kGroups:
      return GroupScales::pack(source, depth, source_group, panel);
  }
}

void unpack_scales(WeightFormat format, const void* panel, const Depth& depth, size_t target_group,
                   const PanelTarget& target) {
  switch (traits(format).scales) {
    case Scales::kNone:
      return;
    case Scales::kSquares:
      return SquareScales::unpack(panel, depth, target_group, target);
    case Scales::kGroups:
      return GroupScales::unpack(panel, depth, target_group, target);
  }
}

}  // namespace ktt
