// Forwards that nobody waits for: submitted now, run by the pool's dispatching thread in the order
// of submission, waited for later.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "pool.h"
#include "wait_word.h"

namespace ktt {

class Job;
class Layer;
struct ForwardArgs;

// The dispatching thread, started by the first submission, and the jobs it has before it.
class JobQueue {
 public:
  explicit JobQueue(const Pool& pool) : pool_(pool) {}
  ~JobQueue();  // every job is gone by now
  JobQueue(const JobQueue&) = delete;
  JobQueue& operator=(const JobQueue&) = delete;

 private:
  friend class Job;

  void start();
  void push(Job* job);
  bool remove(Job* job);
  Job* pop();
  void loop();

  const Pool& pool_;
  std::mutex mutex_;
  std::thread thread_;
  Job* first_ = nullptr;
  Job* last_ = nullptr;
  std::atomic<bool> stop_{false};
  WaitWord submitted_;  // counts submissions: the dispatching thread sleeps on it
  WaitWord finished_;   // counts jobs that ended: those who wait for one sleep on it
};

// A forward with fixed arguments, run any number of times. One thread at a time may use it.
class Job {
 public:
  // `args.choices.num_tokens` is the upper limit of what `num_tokens`, when not null, holds. With
  // `ready`, a submission runs once *ready has reached the number of submissions; with `done`, that
  // number is stored there when it has run.
  Job(Layer& layer, const ForwardArgs& args, const int32_t* num_tokens, const uint32_t* ready,
      uint32_t* done);
  // Waits for the last submission; one whose arguments are not ready is dropped.
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // Throws Error when the last submission is still pending, and in a process forked from the pool's
  // own, like wait().
  void submit();
  // Returns when nothing is pending; throws what went wrong since the last wait.
  void wait();

  // The same for callers that cannot take an exception: the next wait throws it.
  void submit_on_stream() noexcept;
  void wait_on_stream() noexcept;

 private:
  friend class JobQueue;
  // kFinishing: has run; `done` is about to be stored.
  enum class State : int32_t { kIdle, kPending, kFinishing };

  void require_own_process() const;
  bool is_ready() const;
  void wait_until_idle() const;
  void run() noexcept;
  void forward() const;
  void keep(std::exception_ptr error) noexcept;

  Layer& layer_;
  JobQueue& queue_;
  const std::unique_ptr<const ForwardArgs> args_;
  const int32_t* const num_tokens_;
  const uint32_t* const ready_;
  uint32_t* const done_;

  Job* next_ = nullptr;  // in the queue
  uint32_t num_submitted_ = 0;
  std::atomic<State> state_{State::kIdle};
  std::atomic<bool> is_dropped_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace ktt
