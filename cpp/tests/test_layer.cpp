// Whole layers on every runnable kernel table, the AMX model among them: right, and bit for bit the
// same whatever the batch, the number of threads and the number of calls.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "check.h"
#include "moe.h"
#include "tables.h"

namespace ktt {
namespace {

constexpr size_t kExperts = 5;
constexpr size_t kTopK = 3;

struct Case {
  const KernelTable* table;
  WeightFormat format;
  Dtype mode;
  size_t hidden;
  size_t inter;
};

struct Batch {
  Batch(size_t tokens, size_t hidden, unsigned seed) : num_tokens(tokens) {
    Random random(seed);
    x = random.normals(tokens * hidden, 1.0f);
    for (size_t i = 0; i < tokens * kTopK; ++i) {
      // Expert 0 is busy, some choices live elsewhere, some tokens choose an expert twice.
      const size_t draw = random.below(2 * kExperts);
      ids.push_back(draw < kExperts ? static_cast<int32_t>(draw) : draw == kExperts ? -1 : 0);
      weights.push_back(random.normal(0.5f));
    }
  }
  size_t num_tokens;
  std::vector<float> x;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

std::vector<Expert> experts_of(const Case& c) {
  Random random(11);
  std::vector<Expert> experts;
  for (size_t e = 0; e < kExperts; ++e) {
    experts.push_back(random_expert(random, c.hidden, c.inter, c.format));
  }
  return experts;
}

PoolOptions options_of(size_t num_threads, size_t num_parts) {
  PoolOptions options;
  options.num_threads = num_threads;
  options.num_parts = num_parts;
  return options;
}

std::unique_ptr<Layer> layer_of(const Case& c, const std::vector<Expert>& experts,
                                const PoolOptions& options, size_t max_tokens) {
  auto engine = std::make_shared<Engine>(options, Dispatch{Isa::kAuto, c.table});
  auto layer = std::make_unique<Layer>(engine, LayerShape{kExperts, c.hidden, c.inter, c.format},
                                       c.mode, LayerLimits{max_tokens, kTopK});
  for (size_t e = 0; e < experts.size(); ++e) layer->set_expert(e, experts[e].source());
  return layer;
}

std::vector<float> run(Layer& layer, const Batch& batch, size_t first, size_t count) {
  const size_t hidden = layer.shape().hidden_size;
  std::vector<float> out(count * hidden, std::nanf(""));
  layer.forward(
      {{count, kTopK, batch.ids.data() + first * kTopK, batch.weights.data() + first * kTopK},
       Dtype::kFloat32,
       batch.x.data() + first * hidden,
       out.data()});
  return out;
}

double dot(const std::vector<double>& matrix, size_t row, const std::vector<double>& v) {
  double sum = 0.0;
  for (size_t i = 0; i < v.size(); ++i) sum += matrix[row * v.size() + i] * v[i];
  return sum;
}

std::vector<double> expected_token(const Case& c, const std::vector<Expert>& experts,
                                   const Batch& batch, size_t token) {
  std::vector<double> total(c.hidden, 0.0);
  const auto begin = batch.x.begin() + static_cast<ptrdiff_t>(token * c.hidden);
  const std::vector<double> x(begin, begin + static_cast<ptrdiff_t>(c.hidden));
  for (size_t k = 0; k < kTopK; ++k) {
    const int32_t id = batch.ids[token * kTopK + k];
    if (id < 0) continue;
    const Expert& expert = experts[static_cast<size_t>(id)];
    std::vector<double> middle(c.inter);
    for (size_t i = 0; i < c.inter; ++i) {
      const double gate = dot(expert.gate.values, i, x);
      middle[i] = gate / (1.0 + std::exp(-gate)) * dot(expert.up.values, i, x);
    }
    for (size_t h = 0; h < c.hidden; ++h) {
      total[h] += double{batch.weights[token * kTopK + k]} * dot(expert.down.values, h, middle);
    }
  }
  return total;
}

void check_close(const Case& c, const std::vector<Expert>& experts, const Batch& batch,
                 const std::vector<float>& out) {
  double error = 0.0;
  double size = 0.0;
  for (size_t token = 0; token < batch.num_tokens; ++token) {
    const auto wanted = expected_token(c, experts, batch, token);
    for (size_t h = 0; h < c.hidden; ++h) {
      const double difference = double{out[token * c.hidden + h]} - wanted[h];
      error += difference * difference;
      size += wanted[h] * wanted[h];
    }
  }
  CHECK(std::sqrt(error / size) <= (c.mode == Dtype::kFloat32 ? 1e-5 : 5e-3));
}

void check_layer(const Case& c) {
  constexpr size_t kTokens = 37;
  const auto experts = experts_of(c);
  const Batch batch(kTokens, c.hidden, 5);
  const auto layer = layer_of(c, experts, options_of(1, 1), kTokens);
  const auto out = run(*layer, batch, 0, kTokens);
  check_close(c, experts, batch, out);
  for (const size_t count : {1, 5, 20}) {
    for (size_t first = 0; first + count <= kTokens; first += 2 * count) {
      const auto some = run(*layer, batch, first, count);
      CHECK(std::equal(some.begin(), some.end(),
                       out.begin() + static_cast<ptrdiff_t>(first * c.hidden)));
    }
  }
  const auto by_many = run(*layer_of(c, experts, options_of(3, 1), kTokens), batch, 0, kTokens);
  CHECK(by_many == out);
  for (const size_t num_parts : {2, 3}) {
    const auto cut = layer_of(c, experts, options_of(4, num_parts), kTokens);
    const auto cut_out = run(*cut, batch, 0, kTokens);
    check_close(c, experts, batch, cut_out);
    CHECK(run(*layer_of(c, experts, options_of(num_parts, num_parts), kTokens), batch, 0,
              kTokens) == cut_out);
    const auto alone = run(*cut, batch, 7, 1);
    CHECK(std::equal(alone.begin(), alone.end(),
                     cut_out.begin() + static_cast<ptrdiff_t>(7 * c.hidden)));
  }
}

TEST(layers_on_every_table) {
  for (const KernelTable* table : runnable_tables()) {
    for (const Dtype mode : {Dtype::kFloat32, Dtype::kBfloat16}) {
      check_layer({table, WeightFormat::kBf16, mode, 64, 32});
      check_layer({table, WeightFormat::kFp8, mode, 160, 224});
    }
  }
}

TEST(many_rows_of_one_expert_are_cut_into_tasks) {
  constexpr size_t kTokens = 300;
  for (const KernelTable* table : runnable_tables()) {
    const Case c = {table, WeightFormat::kFp8, Dtype::kBfloat16, 64, 96};
    const auto experts = experts_of(c);
    const Batch batch(kTokens, c.hidden, 6);
    const auto layer = layer_of(c, experts, options_of(2, 1), kTokens);
    const auto out = run(*layer, batch, 0, kTokens);
    check_close(c, experts, batch, out);
    const auto some = run(*layer, batch, 200, 50);
    CHECK(std::equal(some.begin(), some.end(), out.begin() + 200 * 64));
  }
}

TEST(bfloat16_in_and_out_and_in_place) {
  constexpr size_t kTokens = 9;
  for (const KernelTable* table : runnable_tables()) {
    for (const Dtype mode : {Dtype::kFloat32, Dtype::kBfloat16}) {
      const Case c = {table, WeightFormat::kBf16, mode, 96, 64};
      const auto experts = experts_of(c);
      Batch batch(kTokens, c.hidden, 8);
      std::vector<uint16_t> x;
      for (float& v : batch.x) {
        x.push_back(to_bf16(v));
        v = from_bf16(x.back());
      }
      const auto layer = layer_of(c, experts, options_of(2, 1), kTokens);
      const auto wanted = run(*layer, batch, 0, kTokens);
      layer->forward({{kTokens, kTopK, batch.ids.data(), batch.weights.data()},
                      Dtype::kBfloat16,
                      x.data(),
                      x.data()});
      for (size_t i = 0; i < x.size(); ++i) CHECK_EQUAL(x[i], to_bf16(wanted[i]));
    }
  }
}

// A copy that starts at a multiple of its elements' size and of nothing larger.
class Shifted {
 public:
  template <class T>
  explicit Shifted(const std::vector<T>& values, size_t element_bytes = sizeof(T))
      : room_(element_bytes + values.size() * sizeof(T)), shift_(element_bytes) {
    std::memcpy(room_.data() + shift_, values.data(), values.size() * sizeof(T));
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(room_.data() + shift_);
  }

 private:
  std::vector<std::byte> room_;
  size_t shift_;
};

TEST(callers_memory_may_lie_anywhere) {
  constexpr size_t kTokens = 5;
  for (const KernelTable* table : runnable_tables()) {
    for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kFp8}) {
      const Case c = {table, format, Dtype::kFloat32, 96, 64};
      const auto experts = experts_of(c);
      const Batch batch(kTokens, c.hidden, 14);
      const auto wanted = run(*layer_of(c, experts, options_of(2, 1), kTokens), batch, 0, kTokens);
      const auto layer = layer_of(c, {}, options_of(2, 1), kTokens);
      for (size_t e = 0; e < experts.size(); ++e) {
        const size_t bytes = traits(format).element_bytes;
        Shifted gate(experts[e].gate.stored, bytes), up(experts[e].up.stored, bytes);
        Shifted down(experts[e].down.stored, bytes);
        ExpertSource source = experts[e].source();
        source.gate = gate.as<void>();
        source.up = up.as<void>();
        source.down = down.as<void>();
        layer->set_expert(e, source);
      }
      Shifted x(batch.x), ids(batch.ids), weights(batch.weights), out(wanted);
      layer->forward({{kTokens, kTopK, ids.as<int32_t>(), weights.as<float>()},
                      Dtype::kFloat32,
                      x.as<void>(),
                      out.as<void>()});
      CHECK(std::equal(wanted.begin(), wanted.end(), out.as<float>()));
    }
  }
}

TEST(layers_share_a_pool_of_growing_scratch) {
  const Case small = {runnable_tables().back(), WeightFormat::kBf16, Dtype::kFloat32, 32, 32};
  const Case large = {runnable_tables().back(), WeightFormat::kFp8, Dtype::kBfloat16, 288, 160};
  auto engine = std::make_shared<Engine>(options_of(2, 1), Dispatch{Isa::kAuto, small.table});
  std::vector<std::unique_ptr<Layer>> layers;
  for (const Case& c : {small, large}) {
    layers.push_back(std::make_unique<Layer>(
        engine, LayerShape{kExperts, c.hidden, c.inter, c.format}, c.mode, LayerLimits{20, kTopK}));
    const auto experts = experts_of(c);
    for (size_t e = 0; e < kExperts; ++e) layers.back()->set_expert(e, experts[e].source());
  }
  for (const Case& c : {large, small}) {
    const Batch batch(20, c.hidden, 9);
    Layer& layer = c.hidden == small.hidden ? *layers[0] : *layers[1];
    check_close(c, experts_of(c), batch, run(layer, batch, 0, 20));
  }
}

TEST(an_expert_may_be_replaced) {
  const Case c = {runnable_tables()[0], WeightFormat::kBf16, Dtype::kFloat32, 64, 32};
  auto experts = experts_of(c);
  const auto layer = layer_of(c, experts, options_of(2, 1), 4);
  const size_t num_bytes = layer->num_bytes();
  Random random(99);
  experts[0] = random_expert(random, c.hidden, c.inter, c.format);
  layer->set_expert(0, experts[0].source());
  CHECK_EQUAL(layer->num_bytes(), num_bytes);
  const Batch batch(4, c.hidden, 10);
  check_close(c, experts, batch, run(*layer, batch, 0, 4));
}

TEST(damaged_weights_are_refused_by_name) {
  const Case c = {runnable_tables()[0], WeightFormat::kFp8, Dtype::kFloat32, 64, 32};
  auto experts = experts_of(c);
  const auto layer = layer_of(c, experts, options_of(1, 1), 4);
  const Batch batch(4, c.hidden, 12);
  const auto before = run(*layer, batch, 0, 4);
  experts[2].up.stored[64 * 3 + 5] = std::byte{0xFF};
  CHECK_THROWS(layer->set_expert(2, experts[2].source()),
               "expert 2: up holds NaN at row 3, column 5");
  experts[1].down.scales[0] = std::nanf("");
  CHECK_THROWS(layer->set_expert(1, experts[1].source()), "expert 1: down scale 0");
  CHECK(run(*layer, batch, 0, 4) == before);
}

TEST(bad_ids_are_refused_by_place) {
  const Case c = {runnable_tables()[0], WeightFormat::kBf16, Dtype::kFloat32, 64, 32};
  auto experts = experts_of(c);
  experts.pop_back();
  const auto layer = layer_of(c, experts, options_of(1, 1), 4);
  Batch batch(4, c.hidden, 13);
  batch.ids.assign(batch.ids.size(), 0);
  batch.ids[4] = 5;
  CHECK_THROWS(run(*layer, batch, 0, 4), "ids[1][1] = 5, but experts go from 0 to 4");
  batch.ids[4] = -2;
  CHECK_THROWS(run(*layer, batch, 0, 4), "ids[1][1] = -2, but experts go from 0 to 4");
  batch.ids[4] = 4;
  CHECK_THROWS(run(*layer, batch, 0, 4), "ids[1][1] = 4, but that expert has no weights");
  batch.ids.assign(batch.ids.size(), -1);
  for (const float v : run(*layer, batch, 0, 4)) CHECK_EQUAL(v, 0.0f);
}

}  // namespace
}  // namespace ktt
