// A layer's packed weights: slices over the parts, what is refused, whose memory is taken.
#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "weights.h"

namespace {

using namespace ktt;

constexpr size_t kHidden = 160;
constexpr size_t kInter = 288;

struct Kind {
  WeightFormat format;
  size_t group;
  size_t down_group = group;
};
constexpr Kind kKinds[] = {{WeightFormat::kBf16, 128},    {WeightFormat::kFp8, 128},
                           {WeightFormat::kInt8, 128},    {WeightFormat::kInt8, 32},
                           {WeightFormat::kInt4, 64},     {WeightFormat::kInt4, 128, 64},
                           {WeightFormat::kInt8, 128, 32}};

LayerShape shape_of(const Kind& kind, size_t num_experts = 1) {
  return {num_experts, kHidden, kInter, kind.format, kind.group};
}

using Bytes = std::vector<uint8_t>;

// An expert's matrices with their scales, as a caller has them.
struct Expert {
  explicit Expert(const Kind& kind) : kind(kind) {
    for (Bytes* m : {&gate, &up, &down}) m->resize(weight_bytes(kind.format, kHidden * kInter));
    gate_scale = up_scale = Bytes(num_scale_bytes(kInter, kHidden));
    down_scale = Bytes(num_scale_bytes(kHidden, kInter));
  }

  size_t num_scale_bytes(size_t rows, size_t columns) const {
    const FormatTraits t = traits(kind.format);
    const size_t scale_rows = t.scales == Scales::kSquares ? (rows + 127) / 128 : rows;
    return scale_rows * ((columns + kind.group - 1) / kind.group) * t.scale_bytes;
  }
  std::vector<Bytes*> all() { return {&gate, &up, &down, &gate_scale, &up_scale, &down_scale}; }
  ExpertSource source() const {
    return {gate.data(),       up.data(),       down.data(),
            gate_scale.data(), up_scale.data(), down_scale.data()};
  }
  ExpertTarget target() {
    return {gate.data(),       up.data(),       down.data(),
            gate_scale.data(), up_scale.data(), down_scale.data()};
  }

  Kind kind;
  Bytes gate, up, down, gate_scale, up_scale, down_scale;
};

// Any bits but those of what is no finite number.
Expert random_expert(const Kind& kind, unsigned seed) {
  Expert e(kind);
  std::mt19937 random(seed);
  for (Bytes* bytes : e.all()) {
    for (uint8_t& byte : *bytes) {
      byte = static_cast<uint8_t>(random());
      if ((byte & 0x7F) == 0x7F) byte = 0;
    }
  }
  return e;
}

void pack(ExpertSlice& slice, size_t expert, const ExpertSource& source) {
  slice.take(expert);
  for (size_t i = 0; i < slice.num_panels(); ++i) slice.pack_panel(expert, i, source);
}

void unpack(const ExpertSlice& slice, size_t expert, const ExpertTarget& target) {
  for (size_t i = 0; i < slice.num_panels(); ++i) slice.unpack_panel(expert, i, target);
}

void check_same(Expert a, Expert b) {
  const auto all_a = a.all();
  const auto all_b = b.all();
  for (size_t i = 0; i < all_a.size(); ++i) CHECK(*all_a[i] == *all_b[i]);
}

// Widths of the parts, ragged and empty ones too.
const std::vector<std::vector<size_t>> kCuts = {{288}, {160, 128}, {32, 64, 192}, {96, 0, 192}};

TEST(parts_together_give_back_what_they_were_given) {
  for (const Kind& kind : kKinds) {
    for (const auto& widths : kCuts) {
      const Expert expert = random_expert(kind, 1);
      Expert back(kind);
      size_t begin = 0;
      for (const size_t width : widths) {
        ExpertSlice slice(shape_of(kind), begin, width, kind.down_group, -1);
        pack(slice, 0, expert.source());
        unpack(slice, 0, back.target());
        begin += width;
      }
      check_same(expert, back);
    }
  }
}

// As a part's workers and its neighbours' find them.
TEST(panels_say_what_the_kernels_need) {
  const ExpertSlice slice(shape_of({WeightFormat::kInt4, 64}, 2), 96, 192, 64, -1);
  CHECK_EQUAL(slice.num_gate_up_panels(), size_t{12});
  CHECK_EQUAL(slice.num_down_panels(), size_t{5});
  CHECK_EQUAL(slice.num_panels(), size_t{17});
  const ExpertSlice empty(shape_of({WeightFormat::kBf16, 128}), 288, 0, 128, -1);
  CHECK_EQUAL(empty.num_panels(), size_t{0});
  CHECK_EQUAL(empty.bytes_per_expert(), size_t{0});
}

TEST(a_panel_of_the_slice_is_the_packed_panel_of_its_rows) {
  for (const Kind& kind : kKinds) {
    const Expert expert = random_expert(kind, 2);
    ExpertSlice slice(shape_of(kind), 96, 192, kind.down_group, -1);
    pack(slice, 0, expert.source());

    const auto gate_up = slice.gate_up(0);
    CHECK_EQUAL(gate_up.count, size_t{12});
    CHECK_EQUAL(gate_up.depth.size, kHidden);
    CHECK_EQUAL(gate_up.scales == nullptr, kind.format == WeightFormat::kBf16);
    const size_t row_bytes = weight_bytes(kind.format, kHidden);
    const size_t row = 96 + 3 * kTileColumns;
    Bytes wanted(gate_up.panel_bytes);
    const PanelSource rows = {{&expert.gate[row * row_bytes], &expert.up[row * row_bytes]},
                              row_bytes};
    pack_panel(kind.format, rows, {kHidden, 0, kind.group}, wanted.data());
    CHECK(std::memcmp(gate_up.weights + 3 * gate_up.panel_bytes, wanted.data(), wanted.size()) ==
          0);

    const auto down = slice.down(0);
    CHECK_EQUAL(down.count, size_t{5});
    CHECK_EQUAL(down.depth.begin, size_t{96});
    CHECK_EQUAL(down.depth.size, size_t{192});
    const size_t inter_bytes = weight_bytes(kind.format, kInter);
    const size_t cut = weight_bytes(kind.format, 96);
    const PanelSource down_rows = {
        {&expert.down[64 * inter_bytes + cut], &expert.down[80 * inter_bytes + cut]}, inter_bytes};
    wanted.resize(down.panel_bytes);
    pack_panel(kind.format, down_rows, down.depth, wanted.data());
    CHECK(std::memcmp(down.weights + 2 * down.panel_bytes, wanted.data(), wanted.size()) == 0);
  }
}

template <class T>
void put(Bytes& bytes, size_t index, T value) {
  std::memcpy(bytes.data() + index * sizeof(T), &value, sizeof(T));
}

TEST(what_is_no_number_is_refused_with_its_place) {
  const auto refusal = [](Expert& e, const char* word) {
    ExpertSlice slice(shape_of(e.kind, 8), 32, 256, e.kind.down_group, -1);
    CHECK_THROWS(pack(slice, 7, e.source()), word);
  };
  const Kind fp8 = {WeightFormat::kFp8, 128};
  for (const uint8_t nan : {uint8_t{0x7F}, uint8_t{0xFF}}) {
    Expert e = random_expert(fp8, 3);
    e.up[50 * kHidden + 131] = nan;
    refusal(e, "expert 7: up weight [50, 131] is not a finite number; the checkpoint is damaged");
  }
  Expert e = random_expert(fp8, 3);
  e.down[17 * kInter + 287] = 0x7F;
  refusal(e, "expert 7: down weight [17, 287]");
  e = random_expert(fp8, 3);
  put(e.gate_scale, 2 * 2 + 1, uint32_t{0x7F800000});  // infinity
  refusal(e, "expert 7: gate scale [2, 1]");

  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    Expert q = random_expert({format, 64}, 3);
    put(q.down_scale, 140 * 5 + 4, uint16_t{0xFFC0});
    refusal(q, "expert 7: down scale [140, 4]");
    q = random_expert({format, 64}, 3);
    put(q.up_scale, 40 * 3 + 2, uint16_t{0x7F80});
    refusal(q, "expert 7: up scale [40, 2]");
    Expert fine = random_expert({format, 128, 32}, 3);
    put(fine.down_scale, 140 * 3 + 1, uint16_t{0xFFC0});
    refusal(fine, "expert 7: down scale [140, 1]");
  }
}

TEST(an_expert_is_taken_out_and_its_neighbours_stay) {
  const Kind kind = {WeightFormat::kInt8, 64};
  ExpertSlice slice(shape_of(kind, 20), 0, kInter, kind.group, -1);
  std::vector<Expert> experts;
  for (unsigned i = 0; i < 20; ++i) experts.push_back(random_expert(kind, i));
  for (const size_t i : {19, 3, 8}) pack(slice, i, experts[i].source());
  CHECK(slice.gate_up(19).weights < slice.gate_up(3).weights);
  const std::byte* freed = slice.gate_up(3).weights;
  slice.release(3);
  slice.release(3);
  pack(slice, 12, experts[12].source());
  CHECK(slice.gate_up(12).weights == freed);
  pack(slice, 8, experts[4].source());
  for (const auto& [place, content] : {std::pair{19, 19}, {8, 4}, {12, 12}}) {
    Expert back(kind);
    unpack(slice, static_cast<size_t>(place), back.target());
    check_same(experts[static_cast<size_t>(content)], back);
  }
}

}  // namespace
