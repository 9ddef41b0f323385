// Jobs: run in order without a caller, wait for flags and set them, keep their errors.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "error.h"
#include "job.h"
#include "moe.h"
#include "tables.h"

namespace ktt {
namespace {

constexpr size_t kHidden = 64;
constexpr size_t kTokens = 3;
constexpr LayerShape kShape = {1, kHidden, 32, WeightFormat::kBf16, kChunkDepth};

// A layer of one expert, a batch, and its result by a plain call.
struct Bench {
  explicit Bench(size_t num_threads = 2) {
    PoolOptions options;
    options.num_threads = num_threads;
    options.num_parts = 1;
    auto engine = std::make_shared<Engine>(options, Dispatch{Isa::kAuto, runnable_tables().back()});
    layer = std::make_unique<Layer>(engine, kShape, Activation::kFloat32, LayerLimits{kTokens, 1});
    Random random(3);
    layer->set_expert(0, random_expert(random, kHidden, 32, WeightFormat::kBf16).source());
    x = random.normals(kTokens * kHidden, 1.0f);
    wanted = out;
    auto args = arguments();
    args.out = wanted.data();
    layer->forward(args);
  }

  ForwardArgs arguments() {
    return {{kTokens, 1, ids.data(), weights.data()}, Dtype::kFloat32, x.data(), out.data(), false};
  }
  bool is_right() const { return out == wanted; }
  void forget() { out.assign(out.size(), 0.0f); }

  std::vector<float> x;
  std::vector<float> out = std::vector<float>(kTokens * kHidden);
  std::vector<float> wanted;
  std::vector<int32_t> ids = std::vector<int32_t>(kTokens, 0);
  std::vector<float> weights = std::vector<float>(kTokens, 1.0f);
  std::unique_ptr<Layer> layer;
};

TEST(a_job_runs_as_often_as_it_is_submitted) {
  for (const size_t num_threads : {1, 3}) {
    Bench bench(num_threads);
    Job job(*bench.layer, bench.arguments(), nullptr, nullptr, nullptr);
    for (int round = 0; round < 50; ++round) {
      bench.forget();
      job.submit();
      job.wait();
      CHECK(bench.is_right());
    }
    job.wait();  // nothing pending
  }
}

TEST(jobs_run_in_the_order_of_submission) {
  Bench bench;
  std::vector<float> middle(kTokens * kHidden);
  std::vector<float> end(kTokens * kHidden);
  auto first_args = bench.arguments();
  first_args.out = middle.data();
  auto second_args = bench.arguments();
  second_args.x = middle.data();
  second_args.out = end.data();
  Job first(*bench.layer, first_args, nullptr, nullptr, nullptr);
  Job second(*bench.layer, second_args, nullptr, nullptr, nullptr);
  std::vector<float> wanted(end.size());
  second_args.x = bench.wanted.data();
  second_args.out = wanted.data();
  bench.layer->forward(second_args);
  for (int round = 0; round < 50; ++round) {
    middle.assign(middle.size(), 0.0f);
    first.submit();
    second.submit();
    second.wait();
    CHECK(end == wanted);
    first.wait();
  }
}

TEST(flags_tell_when_arguments_and_results_are_there) {
  Bench bench;
  uint32_t ready = 0;
  uint32_t done = 0;
  int32_t num_tokens = 0;
  Job job(*bench.layer, bench.arguments(), &num_tokens, &ready, &done);
  for (uint32_t round = 1; round <= 20; ++round) {
    bench.forget();
    num_tokens = 0;
    job.submit();
    std::this_thread::sleep_for(std::chrono::microseconds(round * 20));
    CHECK_EQUAL(__atomic_load_n(&done, __ATOMIC_ACQUIRE), round - 1);
    __atomic_store_n(&num_tokens, int32_t{kTokens}, __ATOMIC_RELAXED);
    __atomic_store_n(&ready, round, __ATOMIC_RELEASE);
    while (__atomic_load_n(&done, __ATOMIC_ACQUIRE) != round) std::this_thread::yield();
    CHECK(bench.is_right());
    // Whoever has seen `done` may submit again without waiting.
  }
  job.wait();
}

TEST(the_number_of_tokens_is_read_when_the_job_runs) {
  Bench bench;
  int32_t num_tokens = 1;
  Job job(*bench.layer, bench.arguments(), &num_tokens, nullptr, nullptr);
  bench.forget();
  job.submit();
  job.wait();
  CHECK(std::equal(bench.out.begin(), bench.out.begin() + kHidden, bench.wanted.begin()));
  CHECK_EQUAL(bench.out[kHidden], 0.0f);
  for (const int32_t wrong : {-1, static_cast<int32_t>(kTokens) + 1}) {
    num_tokens = wrong;
    job.submit();
    CHECK_THROWS(job.wait(), "num_tokens is " + std::to_string(wrong));
    job.wait();  // told once
  }
}

TEST(errors_are_kept_for_the_wait_and_done_is_stored) {
  Bench bench;
  uint32_t done = 0;
  Job job(*bench.layer, bench.arguments(), nullptr, nullptr, &done);
  bench.ids[1] = 7;
  job.submit_on_stream();
  job.wait_on_stream();
  CHECK_EQUAL(done, uint32_t{1});
  CHECK_THROWS(job.wait(), "ids[1][0] = 7");
  bench.ids[1] = 0;
  job.submit_on_stream();
  job.wait();
  CHECK(bench.is_right());
}

TEST(a_pending_job_is_not_submitted_again) {
  Bench bench;
  uint32_t ready = 0;
  Job job(*bench.layer, bench.arguments(), nullptr, &ready, nullptr);
  job.submit();
  CHECK_THROWS(job.submit(), "still pending");
  job.submit_on_stream();
  __atomic_store_n(&ready, 1u, __ATOMIC_RELEASE);
  CHECK_THROWS(job.wait(), "still pending");
  CHECK(bench.is_right());
}

// An error elsewhere may leave a flag unset for ever: nothing hangs on it.
TEST(jobs_that_are_never_ready_can_be_destroyed) {
  Bench bench;
  const uint32_t never = 0;
  auto first = std::make_unique<Job>(*bench.layer, bench.arguments(), nullptr, &never, nullptr);
  auto second = std::make_unique<Job>(*bench.layer, bench.arguments(), nullptr, &never, nullptr);
  auto third = std::make_unique<Job>(*bench.layer, bench.arguments(), nullptr, nullptr, nullptr);
  first->submit();
  second->submit();
  third->submit();
  bench.forget();
  second.reset();  // waits in the queue
  first.reset();   // the dispatching thread waits for it
  third.reset();   // runs
  CHECK(bench.is_right());
}

bool is_refused_elsewhere(Job& job, void (Job::*call)()) {
  try {
    (job.*call)();
  } catch (const Error& error) {
    return std::string(error.what()).find("make a pool here") != std::string::npos;
  }
  return false;
}

// Nobody runs jobs there: a forked process may destroy one, pending as it may be, and no more.
TEST(a_forked_process_waits_for_no_job) {
  Bench bench;
  uint32_t ready = 0;
  auto job = std::make_unique<Job>(*bench.layer, bench.arguments(), nullptr, &ready, nullptr);
  job->submit();
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that waits for ever fails instead
    const bool is_refused =
        is_refused_elsewhere(*job, &Job::submit) && is_refused_elsewhere(*job, &Job::wait);
    job.reset();
    bench.layer.reset();
    _exit(is_refused ? 0 : 1);
  }
  int status = -1;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(status, 0);
  __atomic_store_n(&ready, 1u, __ATOMIC_RELEASE);
  job->wait();
  CHECK(bench.is_right());
}

TEST(a_job_waits_for_its_arguments_while_others_compute) {
  Bench bench;
  uint32_t ready = 0;
  Job job(*bench.layer, bench.arguments(), nullptr, &ready, nullptr);
  job.submit();
  bench.forget();
  bench.layer->forward(bench.arguments());
  CHECK(bench.is_right());
  __atomic_store_n(&ready, 1u, __ATOMIC_RELEASE);
  job.wait();
}

TEST(threads_submit_jobs_of_their_own) {
  Bench bench;
  std::vector<std::thread> threads;
  std::atomic<int> num_right{0};
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      std::vector<float> out(kTokens * kHidden);
      auto args = bench.arguments();
      args.out = out.data();
      for (int round = 0; round < 20; ++round) {
        Job job(*bench.layer, args, nullptr, nullptr, nullptr);
        out.assign(out.size(), 0.0f);
        job.submit();
        job.wait();
        num_right += out == bench.wanted;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQUAL(num_right.load(), 60);
}

}  // namespace
}  // namespace ktt
