// The C wall: every wrong argument is an error code with a message that names it.
#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kttrio.h"

namespace {

constexpr int32_t kSize = 128;
constexpr uint64_t kMatrixBytes = uint64_t{kSize} * kSize;  // of a format with one byte a weight

struct Wall {
  Wall() {
    CHECK_EQUAL(ktt_pool_create(KTT_ISA_AUTO, 2, nullptr, 1, &pool), KTT_OK);
    bf16 = layer(KTT_FORMAT_BF16, 0);
    fp8 = layer(KTT_FORMAT_FP8, 128);
    int4 = layer(KTT_FORMAT_INT4, 64);
  }
  ~Wall() {
    ktt_pool_destroy(pool);  // layers keep it alive
    ktt_layer_destroy(bf16);
    ktt_layer_destroy(fp8);
    ktt_layer_destroy(int4);
  }
  ktt_layer* layer(int32_t format, int32_t group) const {
    ktt_layer* made = nullptr;
    CHECK_EQUAL(
        ktt_layer_create(pool, 2, kSize, kSize, format, group, KTT_ACTIVATION_FLOAT32, 4, 2, &made),
        KTT_OK);
    return made;
  }
  // One for every matrix; scales for fp8 if there are any.
  ktt_expert expert(uint64_t matrix_bytes, void* scale, uint64_t scale_bytes) {
    return {matrix.data(), matrix.data(), matrix.data(), scale,      scale,
            scale,         matrix_bytes,  scale_bytes,   scale_bytes};
  }
  ktt_forward forward(int32_t num_tokens) {
    return {num_tokens, 1, ids.data(), weights.data(), x.data(), out.data(), KTT_FLOAT32, 0};
  }

  ktt_pool* pool = nullptr;
  ktt_layer* bf16 = nullptr;
  ktt_layer* fp8 = nullptr;
  ktt_layer* int4 = nullptr;
  std::vector<uint8_t> matrix = std::vector<uint8_t>(kMatrixBytes * 2);
  std::vector<float> scale = {1.0f};
  std::vector<int32_t> ids = std::vector<int32_t>(8);
  std::vector<float> weights = std::vector<float>(8, 1.0f);
  std::vector<float> x = std::vector<float>(4 * kSize, 1.0f);
  std::vector<float> out = std::vector<float>(4 * kSize, 1.0f);
};

void check_error(int32_t code, int32_t wanted, const char* word) {
  CHECK_EQUAL(code, wanted);
  check::that(std::string(ktt_last_error()).find(word) != std::string::npos, ktt_last_error(),
              __FILE__, __LINE__);
}

TEST(versions_agree) { CHECK_EQUAL(ktt_abi_version(), KTT_ABI_VERSION); }

TEST(instruction_sets) {
  CHECK_EQUAL(ktt_isa_granted(KTT_ISA_AUTO), 0);
  CHECK_EQUAL(ktt_isa_granted(17), 0);
  ktt_pool* pool = nullptr;
  for (int32_t isa = KTT_ISA_AUTO; isa <= KTT_ISA_AVX512_BF16; ++isa) {
    const int32_t code = ktt_pool_create(isa, 1, nullptr, 0, &pool);
    if (isa != KTT_ISA_AUTO && ktt_isa_granted(isa) == 0) {
      check_error(code, KTT_UNSUPPORTED, "avx2_base");  // which is granted instead
      continue;
    }
    CHECK_EQUAL(code, KTT_OK);
    int32_t chosen = 0, num_threads = 0, num_nodes = 0;
    CHECK_EQUAL(ktt_pool_info(pool, &chosen, &num_threads, &num_nodes), KTT_OK);
    CHECK(chosen >= KTT_ISA_AMX);  // a table, not what stands for several
    CHECK_EQUAL(ktt_isa_granted(chosen), 1);
    if (isa >= KTT_ISA_AMX) CHECK_EQUAL(chosen, isa);
    CHECK_EQUAL(num_threads, 1);
    CHECK_EQUAL(ktt_pool_destroy(pool), KTT_OK);
  }
}

TEST(pools_check_their_arguments) {
  ktt_pool* pool = nullptr;
  const int32_t far[] = {999};
  check_error(ktt_pool_create(9, 1, nullptr, 0, &pool), KTT_INVALID_ARGUMENT, "isa is 9");
  check_error(ktt_pool_create(0, -1, nullptr, 0, &pool), KTT_INVALID_ARGUMENT, "num_threads is -1");
  check_error(ktt_pool_create(0, 1, nullptr, -3, &pool), KTT_INVALID_ARGUMENT, "num_nodes is -3");
  check_error(ktt_pool_create(0, 1, far, 1, &pool), KTT_INVALID_ARGUMENT, "NUMA node 999");
  check_error(ktt_pool_create(0, 1, nullptr, 2, &pool), KTT_INVALID_ARGUMENT, "2 parts");
  check_error(ktt_pool_create(0, 1, nullptr, 0, nullptr), KTT_INVALID_ARGUMENT, "pool is a null");
  CHECK(pool == nullptr);
  CHECK_EQUAL(ktt_pool_destroy(nullptr), KTT_OK);
  int32_t value = 0;
  check_error(ktt_pool_info(nullptr, &value, &value, &value), KTT_INVALID_ARGUMENT, "pool");
}

TEST(layers_check_their_arguments) {
  Wall w;
  ktt_layer* layer = nullptr;
  const auto create = [&](int32_t experts, int32_t hidden, int32_t inter, int32_t format,
                          int32_t group, int32_t mode, int32_t tokens, int32_t top_k) {
    return ktt_layer_create(w.pool, experts, hidden, inter, format, group, mode, tokens, top_k,
                            &layer);
  };
  const int32_t bad = KTT_INVALID_ARGUMENT;
  check_error(create(0, 32, 32, 0, 0, 0, 1, 1), bad, "num_experts is 0");
  check_error(create(1, 40, 32, 0, 0, 0, 1, 1), bad, "hidden_size is 40, but must be a multiple");
  check_error(create(1, 32, 16, 0, 0, 0, 1, 1), bad, "intermediate_size is 16");
  check_error(create(1, 32, -32, 0, 0, 0, 1, 1), bad, "intermediate_size is -32");
  check_error(create(1, 32, 32, 4, 0, 0, 1, 1), bad, "weight_format is 4");
  check_error(create(1, 32, 32, KTT_FORMAT_BF16, 64, 0, 1, 1), bad, "group_size is 64, but must");
  check_error(create(1, 32, 32, KTT_FORMAT_FP8, 0, 0, 1, 1), bad,
              "group_size is 0, but must be 128");
  check_error(create(1, 32, 32, KTT_FORMAT_INT8, 16, 0, 1, 1), bad,
              "group_size is 16, but must be 32");
  check_error(create(1, 32, 32, KTT_FORMAT_INT4, -64, 0, 1, 1), bad, "group_size is -64");
  check_error(create(1, 32, 32, 0, 0, 3, 1, 1), bad, "activation is 3");
  check_error(create(1, 32, 32, KTT_FORMAT_FP8, 128, KTT_ACTIVATION_INT8, 1, 1), bad,
              "int8 activations are for int8 and int4 weights");
  check_error(create(1, 32, 32, 0, 0, 0, 0, 1), bad, "max_tokens is 0");
  check_error(create(1, 32, 32, 0, 0, 0, 1, 0), bad, "max_top_k is 0");
  check_error(ktt_layer_create(nullptr, 1, 32, 32, 0, 0, 0, 1, 1, &layer), bad, "pool is a null");
  check_error(ktt_layer_create(w.pool, 1, 32, 32, 0, 0, 0, 1, 1, nullptr), bad, "layer is a null");
  CHECK(layer == nullptr);
}

TEST(more_memory_than_there_is_is_an_error) {
  Wall w;
  ktt_layer* layer = nullptr;
  const int32_t huge = 1 << 18;
  check_error(ktt_layer_create(w.pool, 1 << 16, huge, huge, KTT_FORMAT_BF16, 0, 0, 1, 1, &layer),
              KTT_OUT_OF_MEMORY, "out of memory");
}

TEST(experts_check_their_arguments) {
  Wall w;
  const int32_t bad = KTT_INVALID_ARGUMENT;
  using Call = int32_t (*)(ktt_layer*, int32_t, const ktt_expert*);
  for (const Call call : {Call{ktt_layer_set_expert}, Call{ktt_layer_get_expert}}) {
    ktt_expert e = w.expert(2 * kMatrixBytes, nullptr, 0);
    check_error(call(nullptr, 0, &e), bad, "layer is a null");
    check_error(call(w.bf16, 0, nullptr), bad, "the expert is a null");
    check_error(call(w.bf16, 2, &e), bad, "expert is 2");
    check_error(call(w.bf16, -1, &e), bad, "expert is -1");
    e.gate = nullptr;
    check_error(call(w.bf16, 0, &e), bad, "gate is a null");
    e = w.expert(kMatrixBytes, nullptr, 0);
    check_error(call(w.bf16, 0, &e), bad, "matrix_bytes is 16384, but this layer needs 32768");
    check_error(call(w.fp8, 0, &e), bad, "gate_scale is a null");
    e = w.expert(2 * kMatrixBytes, w.scale.data(), 4);
    check_error(call(w.bf16, 0, &e), bad, "has no scales");
    e = w.expert(2 * kMatrixBytes, nullptr, 4);
    check_error(call(w.bf16, 0, &e), bad, "gate_scale_bytes is 4, but this layer needs 0");
    e = w.expert(kMatrixBytes, w.scale.data(), 8);
    check_error(call(w.fp8, 0, &e), bad, "gate_scale_bytes is 8, but this layer needs 4");
    e = w.expert(kMatrixBytes / 2, w.scale.data(), 128 * 2 * 2);
    e.down_scale_bytes = 4;
    check_error(call(w.int4, 0, &e), bad, "down_scale_bytes is 4, but this layer needs 512");
  }
  check_error(ktt_layer_clear_expert(nullptr, 0), bad, "layer is a null");
  check_error(ktt_layer_clear_expert(w.bf16, 2), bad, "expert is 2");
}

TEST(experts_come_and_go) {
  Wall w;
  const ktt_expert e = w.expert(kMatrixBytes, w.scale.data(), 4);
  uint64_t num_bytes = 1;
  CHECK_EQUAL(ktt_layer_bytes(w.fp8, &num_bytes), KTT_OK);
  CHECK_EQUAL(num_bytes, uint64_t{0});
  check_error(ktt_layer_get_expert(w.fp8, 0, &e), KTT_INVALID_ARGUMENT, "expert 0 has no weights");
  CHECK_EQUAL(ktt_layer_set_expert(w.fp8, 0, &e), KTT_OK);
  CHECK_EQUAL(ktt_layer_bytes(w.fp8, &num_bytes), KTT_OK);
  CHECK(num_bytes >= 3 * kMatrixBytes);
  w.scale[0] = 7.0f;
  CHECK_EQUAL(ktt_layer_get_expert(w.fp8, 0, &e), KTT_OK);
  CHECK_EQUAL(w.scale[0], 1.0f);
  w.matrix[5] = 0xFF;
  check_error(ktt_layer_set_expert(w.fp8, 0, &e), KTT_INVALID_ARGUMENT,
              "weight [0, 5] is not a finite number");
  check_error(ktt_layer_get_expert(w.fp8, 0, &e), KTT_INVALID_ARGUMENT, "expert 0 has no weights");
  CHECK_EQUAL(ktt_layer_clear_expert(w.fp8, 0), KTT_OK);
  CHECK_EQUAL(ktt_layer_bytes(w.fp8, &num_bytes), KTT_OK);
  CHECK_EQUAL(num_bytes, uint64_t{0});
  check_error(ktt_layer_bytes(w.fp8, nullptr), KTT_INVALID_ARGUMENT, "num_bytes");
}

// A forward and a job refuse the same.
TEST(forwards_check_their_arguments) {
  Wall w;
  const int32_t bad = KTT_INVALID_ARGUMENT;
  ktt_job* job = nullptr;
  const auto refused = [&](ktt_layer* layer, const ktt_forward* args, const char* word) {
    check_error(ktt_layer_forward(layer, args), bad, word);
    check_error(ktt_job_create(layer, args, nullptr, nullptr, nullptr, &job), bad, word);
  };
  const auto changed = [&](auto member, auto value) {
    ktt_forward args = w.forward(1);
    args.*member = value;
    return args;
  };
  ktt_forward args = w.forward(1);
  refused(nullptr, &args, "layer is a null");
  refused(w.bf16, nullptr, "args is a null");
  args = w.forward(5);
  refused(w.bf16, &args, "num_tokens is 5, but must be from 0 to 4");
  args = w.forward(-1);
  refused(w.bf16, &args, "num_tokens is -1");
  args = changed(&ktt_forward::top_k, 3);
  refused(w.bf16, &args, "top_k is 3");
  args = changed(&ktt_forward::dtype, 7);
  refused(w.bf16, &args, "dtype is 7");
  args = changed(&ktt_forward::ids, nullptr);
  refused(w.bf16, &args, "ids is a null");
  args = changed(&ktt_forward::weights, nullptr);
  refused(w.bf16, &args, "weights is a null");
  args = changed(&ktt_forward::x, nullptr);
  refused(w.bf16, &args, "x is a null");
  args = changed(&ktt_forward::out, nullptr);
  refused(w.bf16, &args, "out is a null");
  args = changed(&ktt_forward::x, w.out.data());
  args.accumulate = 1;
  refused(w.bf16, &args, "does not go with accumulate");
  args = w.forward(1);
  check_error(ktt_layer_forward(w.bf16, &args), bad, "has no weights");
  check_error(ktt_job_create(w.bf16, &args, nullptr, nullptr, nullptr, nullptr), bad, "job is a");
  args = {0, 1, nullptr, nullptr, nullptr, nullptr, KTT_FLOAT32, 0};
  CHECK_EQUAL(ktt_layer_forward(w.bf16, &args), KTT_OK);
}

TEST(a_job_is_a_forward) {
  Wall w;
  const ktt_expert e = w.expert(2 * kMatrixBytes, nullptr, 0);
  for (size_t i = 1; i < w.matrix.size(); i += 2) w.matrix[i] = 0x3D;  // about 0.03
  CHECK_EQUAL(ktt_layer_set_expert(w.bf16, 0, &e), KTT_OK);
  ktt_forward args = w.forward(3);
  CHECK_EQUAL(ktt_layer_forward(w.bf16, &args), KTT_OK);
  CHECK(w.out[0] > 0.0f);
  std::vector<float> out(w.out.size());
  args.out = out.data();
  ktt_job* job = nullptr;
  const uint32_t ready = 2;
  uint32_t done = 0;
  CHECK_EQUAL(ktt_job_create(w.bf16, &args, nullptr, &ready, &done, &job), KTT_OK);
  CHECK_EQUAL(ktt_job_submit(job), KTT_OK);
  CHECK_EQUAL(ktt_job_wait(job), KTT_OK);
  CHECK_EQUAL(done, 1u);
  CHECK(std::equal(out.begin(), out.begin() + 3 * kSize, w.out.begin()));
  CHECK_EQUAL(ktt_layer_clear_expert(w.bf16, 0), KTT_OK);
  ktt_job_submit_on_stream(job);
  ktt_job_wait_on_stream(job);
  check_error(ktt_job_wait(job), KTT_INVALID_ARGUMENT, "has no weights");
  CHECK_EQUAL(ktt_job_destroy(job), KTT_OK);
  CHECK_EQUAL(ktt_job_destroy(nullptr), KTT_OK);
  check_error(ktt_job_submit(nullptr), KTT_INVALID_ARGUMENT, "job is a null");
  check_error(ktt_job_wait(nullptr), KTT_INVALID_ARGUMENT, "job is a null");
}

TEST(messages_belong_to_their_thread) {
  check_error(ktt_layer_bytes(nullptr, nullptr), KTT_INVALID_ARGUMENT, "layer");
  std::string other = "unset";
  std::thread([&] { other = ktt_last_error(); }).join();
  CHECK_EQUAL(other, std::string());
  CHECK(std::strlen(ktt_last_error()) > 0);
}

}  // namespace
