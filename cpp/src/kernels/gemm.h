// The driver, written once over two axes: products (instruction set and mode of the activations)
// and formats. Each table_*.cpp compiles it with its own flags.
//
// A panel's depth is walked in chunks, and a chunk in groups: the stretches that share a scale. A
// group's sums are made in registers and then folded into the task's sums, in order of the groups;
// so a row's results depend on nothing but its own values. Few rows read weights straight from
// memory. For more, a chunk is decoded once, and blocks of rows pass over it.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "format_bf16.h"
#include "format_fp8.h"
#include "format_int4.h"
#include "format_int8.h"
#include "kernel_table.h"
#include "products.h"
#include "rows.h"

namespace ktt {
namespace {

inline constexpr size_t kUnitWeights = kUnitDepth * kTileColumns;
inline constexpr size_t kPrefetchBytes = 4096;

// One chunk of a panel and the rows it meets.
struct Chunk {
  const void* const* rows;
  size_t begin;  // first depth, counted from the task's
  size_t depth;
  size_t first_group;        // depth of the first group, which a cut may have shortened
  size_t group;              // and of the others
  size_t group_index;        // of the first group
  RowOffsets offsets;        // in int8 rows
  const std::byte* weights;  // tile 0, then tile 1
  const std::byte* ahead;    // weights to fetch meanwhile
  const std::byte* scales;   // of the panel
  float* sums;               // [rows][kPanelColumns]
};

template <size_t kCount, size_t kAt = 0, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
  if constexpr (kAt < kCount) {
    body(Index<kAt>{});
    unroll<kCount, kAt + 1>(body);
  }
}

// Where a block reads weights from, and how many bytes of those to come it fetches for each of its
// own units. Weights as they are stored, straight from memory:
template <class Products, class Format>
struct Stored {
  using Reader = typename Products::template Reader<Format>;
  static constexpr size_t kUnitBytes = weight_bytes(Format::kFormat, kUnitWeights);
  static constexpr size_t kFetchBytes = kUnitBytes;
};

// And a chunk in the first cache, in rows as products take them, for several blocks: each fetches
// half of the next chunk. Evenly over time, since the first cache waits for few lines at once.
template <class Products, class Format>
struct Decoded {
  using Reader = StoredRows<typename Products::Isa>;
  static constexpr size_t kUnitBytes = kUnitDepth / Products::kDepths * kRowBytes;
  static constexpr size_t kFetchBytes = weight_bytes(Format::kFormat, kUnitWeights) / 2;
};

// Inlined by force: GCC takes a function that only prefetches for one without effects.
[[gnu::always_inline]] inline void prefetch(const std::byte* from, size_t num_bytes) {
  for (size_t at = 0; at < num_bytes; at += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T0);
  }
}

template <class Isa, class Format>
inline typename Isa::F32 weight_scale(const std::byte* scales, size_t group, size_t column) {
  constexpr FormatTraits kTraits = traits(Format::kFormat);
  if constexpr (kTraits.scales == Scales::kSquares) {
    return Isa::splat(read<float>(scales + (group * 2 + column / kTileColumns) * sizeof(float)));
  } else if constexpr (kTraits.scales == Scales::kGroups) {
    const auto* all = reinterpret_cast<const uint16_t*>(scales);
    return Isa::load_bf16(all + group * kPanelColumns + column);
  } else {
    return Isa::splat(1.0f);
  }
}

// kRows rows times kTiles tiles of a chunk, from tile `tile` on.
template <class Products, class Format, class Source, size_t kRows, size_t kTiles>
struct Block {
  using Isa = typename Products::Isa;
  using Sum = typename Products::Sum;
  using Partial = typename Products::Partial;
  static constexpr size_t kTileVectors = kTileColumns / Isa::kLanes;
  static constexpr size_t kVectors = kTiles * kTileVectors;
  static constexpr size_t kUnitRows = kUnitDepth / Products::kDepths;
  static constexpr size_t kOperandBytes = 4;  // of one broadcast

  explicit Block(const Chunk& chunk, size_t tile)
      : chunk(chunk),
        tile(tile),
        tile_bytes(chunk.depth / kUnitDepth * Source::kUnitBytes),
        unit(chunk.weights + tile * tile_bytes),
        ahead(chunk.ahead + tile * chunk.depth / kUnitDepth * Source::kFetchBytes),
        operand_at(chunk.begin / Products::kDepths * kOperandBytes) {
    for (size_t r = 0; r < kRows; ++r) rows[r] = static_cast<const std::byte*>(chunk.rows[r]);
  }

  // General registers hold so many rows' addresses. GCC would keep the others in vector registers,
  // from where they come slowly: so they are read again each time.
  static constexpr size_t kRowsInRegisters = 8;
  [[gnu::always_inline]] inline const std::byte* row_of(size_t r) const {
    if (r < kRowsInRegisters) return rows[r];
    return static_cast<const std::byte*>(*const_cast<const void* const volatile*>(chunk.rows + r));
  }

  void run() {
    size_t group = chunk.group_index;
    size_t left = chunk.depth;
    for (size_t now = chunk.first_group; left > 0; ++group, now = chunk.group) {
      if (now > left) now = left;
      run_group(group, now / kUnitDepth);
      left -= now;
    }
  }

  inline void run_group(size_t group, size_t num_units) {
    Sum sums[kRows][kVectors];
#pragma GCC unroll 16
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) {
        sums[r][v] = Products::start(rows[r], chunk.offsets, group);
      }
    }
    for (size_t u = 0; u < num_units; u += Products::kPartialUnits) add_units(sums);
    fold(sums, group);
  }

  [[gnu::always_inline]] inline void add_units(Sum (&sums)[kRows][kVectors]) {
    Partial partial[kRows][kVectors];
#pragma GCC unroll 16
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) partial[r][v] = Products::begin(sums[r][v]);
    }
#pragma GCC unroll 4
    for (size_t u = 0; u < Products::kPartialUnits; ++u) add_unit(partial);
#pragma GCC unroll 16
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) {
        sums[r][v] = Products::end(sums[r][v], partial[r][v]);
      }
    }
  }

  [[gnu::always_inline]] inline void add_unit(Partial (&sums)[kRows][kVectors]) {
    using Reader = typename Source::Reader;
    const auto reader = [&](size_t v) {
      return Reader(unit + v / kTileVectors * tile_bytes + v % kTileVectors * sizeof(Partial));
    };
    prefetch(ahead, kTiles * Source::kFetchBytes);
    ahead += kTiles * Source::kFetchBytes;
    if constexpr (kVectors == 1) {
      Reader readers[] = {reader(0)};
      add_rows(sums, readers);
    } else if constexpr (kVectors == 2) {
      Reader readers[] = {reader(0), reader(1)};
      add_rows(sums, readers);
    } else {
      Reader readers[] = {reader(0), reader(1), reader(2), reader(3)};
      add_rows(sums, readers);
    }
    unit += Source::kUnitBytes;
    operand_at += kUnitRows * kOperandBytes;
  }

  template <class Reader>
  [[gnu::always_inline]] inline void add_rows(Partial (&sums)[kRows][kVectors],
                                              Reader (&readers)[kVectors]) {
    unroll<kUnitRows>([&](auto row) __attribute__((always_inline)) {
      typename Products::Weights weights[kVectors];
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) weights[v] = Products::prepare(readers[v].row(row));
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
        const auto operand =
            Products::broadcast(row_of(r) + operand_at + decltype(row)::value * kOperandBytes);
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; ++v) {
          sums[r][v] = Products::add(sums[r][v], weights[v], operand);
        }
      }
    });
  }

  inline void fold(const Sum (&sums)[kRows][kVectors], size_t group) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      const size_t column = tile * kTileColumns + v * Isa::kLanes;
      const auto of_weights = weight_scale<Isa, Format>(chunk.scales, group, column);
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
        float* at = chunk.sums + r * kPanelColumns + column;
        const auto scale = Products::scale(of_weights, rows[r], chunk.offsets, group);
        Isa::store(at, Isa::fma(Products::total(sums[r][v]), scale, Isa::load(at)));
      }
    }
  }

  const Chunk& chunk;
  const size_t tile;
  const size_t tile_bytes;
  const std::byte* unit;
  const std::byte* ahead;
  size_t operand_at;
  const std::byte* rows[kRows];
};

// Rows of a block, so that its sums fit the registers: as many as there can be, and in the blocks
// of many rows, which read each operand for as many tiles at once as suits the instruction set.
template <class Products, size_t kTiles>
inline constexpr size_t kBlockRows =
    Products::kSums / (kTiles * kTileColumns / Products::Isa::kLanes);
template <class Products>
inline constexpr size_t kMaxBlockRows = kBlockRows<Products, 1>;
template <class Products>
inline constexpr size_t kManyBlockRows = kBlockRows<Products, Products::kTilesAtOnce>;

// Tiles that a block reads at once. Rows so few that they wait for memory anyway read one stream:
// memory gives that faster than two.
template <class Products, size_t kRows>
inline constexpr size_t kBlockTiles =
    kRows <= Products::kStreamRows || kBlockRows<Products, 2> < kRows ? 1 : 2;

// A block as a function of its own: its loops have all registers, the places in memory among them.
template <class Block>
[[gnu::noinline, gnu::flatten]] void call_block(const Chunk& chunk, size_t tile) {
  Block(chunk, tile).run();
}

// Calls the kernel that was compiled for just so many rows.
template <class Products, class Format, class Source, size_t kRows>
inline void run_block(size_t num_rows, const Chunk& chunk) {
  if (num_rows == kRows) {
    constexpr size_t kTiles = kBlockTiles<Products, kRows>;
    for (size_t tile = 0; tile < 2; tile += kTiles) {
      using Fitting = Block<Products, Format, Source, kRows, kTiles>;
      if constexpr (Products::kCallsBlocks) {
        call_block<Fitting>(chunk, tile);
      } else {
        Fitting(chunk, tile).run();
      }
    }
  } else if constexpr (kRows > 1) {
    run_block<Products, Format, Source, kRows - 1>(num_rows, chunk);
  }
}

template <class Products, class Format>
inline constexpr bool kDecodes =
    !__is_same(typename Products::template Reader<Format>, StoredRows<typename Products::Isa>);

// The chunk's weights as rows in `to`, tile after tile.
template <class Products, class Format>
inline void decode(const Chunk& chunk, std::byte* to) {
  using Isa = typename Products::Isa;
  using From = Stored<Products, Format>;
  constexpr size_t kVectorBytes = Isa::kLanes * 4;
  for (size_t unit = 0; unit < 2 * chunk.depth / kUnitDepth; ++unit) {
    const size_t from = unit * From::kUnitBytes;
    for (size_t at = 0; at < kRowBytes; at += kVectorBytes) {
      typename From::Reader reader(chunk.weights + from + at);
      unroll<kUnitDepth / Products::kDepths>([&](auto row) __attribute__((always_inline)) {
        Isa::store_bits(to + decltype(row)::value * kRowBytes + at, reader.row(row));
      });
    }
    to += Decoded<Products, Format>::kUnitBytes;
  }
}

// All rows in blocks of even size.
template <class Products, class Format>
inline void run_blocks(size_t num_rows, Chunk chunk, std::byte* scratch) {
  constexpr size_t kMax = kManyBlockRows<Products>;
  const std::byte* const next = chunk.ahead;
  const size_t half = weight_bytes(Format::kFormat, chunk.depth * kPanelColumns) / 2;
  if constexpr (kDecodes<Products, Format>) {
    decode<Products, Format>(chunk, scratch);
    chunk.weights = scratch;
  }
  for (size_t left = (num_rows + kMax - 1) / kMax; left > 0; --left) {
    const size_t now = (num_rows + left - 1) / left;
    chunk.ahead = next + left % 2 * half;
    run_block<Products, Format, Decoded<Products, Format>, kMax>(now, chunk);
    num_rows -= now;
    chunk.rows += now;
    chunk.sums += now * kPanelColumns;
  }
}

// The chunk that starts at depth `begin` of a panel.
template <class Format>
inline Chunk chunk_of(const BlockTask& task, size_t panel, size_t begin) {
  const Depth& depth = task.depth;
  const size_t at = depth.begin + begin;  // in the uncut matrix
  const size_t length = kChunkDepth - at % kChunkDepth;
  const size_t left = depth.size - begin;
  const std::byte* weights = task.weights + panel * task.panel_bytes +
                             weight_bytes(Format::kFormat, begin * kPanelColumns);
  return {.rows = task.rows,
          .begin = begin,
          .depth = length < left ? length : left,
          .first_group = depth.group - at % depth.group,
          .group = depth.group,
          .group_index = at / depth.group - depth.begin / depth.group,
          .offsets = {Int8Row::scales_offset(depth), Int8Row::sums_offset(depth)},
          .weights = weights,
          .ahead = weights + kPrefetchBytes,
          .scales = task.scales + panel * task.panel_scale_bytes,
          .sums = task.sums + panel * task.num_rows * kPanelColumns};
}

template <class Isa>
inline void clear_sums(const BlockTask& task) {
  const size_t count = task.num_panels * task.num_rows * kPanelColumns;
  for (size_t i = 0; i < count; i += Isa::kLanes) Isa::store(task.sums + i, Isa::zero());
}

template <class Products, class Format>
void multiply_few_rows(const BlockTask& task) {
  for (size_t panel = 0; panel < task.num_panels; ++panel) {
    for (size_t begin = 0; begin < task.depth.size;) {
      const Chunk chunk = chunk_of<Format>(task, panel, begin);
      run_block<Products, Format, Stored<Products, Format>, kMaxBlockRows<Products>>(task.num_rows,
                                                                                     chunk);
      begin += chunk.depth;
    }
  }
}

// From so many rows on panels take turns at each chunk: so the chunk's operands are in the cache
// for all panels but the first. Fewer rows stay there anyway, and memory likes panels one by one.
inline constexpr size_t kRowsForTurns = 128;

template <class Products, class Format>
void multiply_many_rows(const BlockTask& task) {
  for (size_t panel = 0; panel < task.num_panels; ++panel) {
    for (size_t begin = 0; begin < task.depth.size;) {
      const Chunk chunk = chunk_of<Format>(task, panel, begin);
      run_blocks<Products, Format>(task.num_rows, chunk, task.decode);
      begin += chunk.depth;
    }
  }
}

template <class Products, class Format>
void multiply_in_turns(const BlockTask& task) {
  for (size_t begin = 0; begin < task.depth.size;) {
    const size_t end = begin + chunk_of<Format>(task, 0, begin).depth;
    for (size_t panel = 0; panel < task.num_panels; ++panel) {
      Chunk chunk = chunk_of<Format>(task, panel, begin);
      const bool is_last = panel + 1 == task.num_panels;
      chunk.ahead = chunk_of<Format>(task, is_last ? 0 : panel + 1, is_last ? end : begin).weights;
      run_blocks<Products, Format>(task.num_rows, chunk, task.decode);
    }
    begin = end;
  }
}

template <class Products, class Format>
void multiply(const BlockTask& task) {
  clear_sums<typename Products::Isa>(task);
  if (task.num_rows <= kMaxBlockRows<Products>) {
    multiply_few_rows<Products, Format>(task);
  } else if (task.num_rows < kRowsForTurns) {
    multiply_many_rows<Products, Format>(task);
  } else {
    multiply_in_turns<Products, Format>(task);
  }
}

}  // namespace
}  // namespace ktt
