#include "job.h"

#include <sched.h>

#include <string>
#include <system_error>
#include <utility>

#include "error.h"
#include "moe.h"

namespace ktt {
namespace {

// A flag that no thread can wake for is polled: at first without giving way.
constexpr int kLooksBeforeYielding = 2000;

// Counters may pass their largest value.
bool has_reached(uint32_t value, uint32_t goal) { return static_cast<int32_t>(value - goal) >= 0; }

// Looks at `holds` until it does.
template <class Holds>
void poll(Holds holds) {
  for (int look = 0; !holds(); ++look) {
    if (look < kLooksBeforeYielding) {
      pause_spinning();
    } else {
      sched_yield();
    }
  }
}

}  // namespace

JobQueue::~JobQueue() {
  if (!thread_.joinable()) return;
  if (pool_.is_forked()) {  // the thread lives elsewhere
    thread_.detach();
    return;
  }
  stop_.store(true, std::memory_order_release);
  submitted_.add(1);
  submitted_.wake(1);
  thread_.join();
}

void JobQueue::start() {
  try {
    thread_ = std::thread([this] { loop(); });
  } catch (const std::system_error& error) {
    throw Error(ErrorCode::kUnsupported,
                std::string("the thread that runs jobs could not be started: ") + error.what() +
                    "; raise the limits on processes and memory (ulimit -a)");
  }
}

void JobQueue::push(Job* job) {
  const std::scoped_lock held(mutex_);
  if (!thread_.joinable()) start();
  job->next_ = nullptr;
  (first_ == nullptr ? first_ : last_->next_) = job;
  last_ = job;
  submitted_.add(1);
  submitted_.wake(1);
}

// Takes a job out again that has not begun.
bool JobQueue::remove(Job* job) {
  const std::scoped_lock held(mutex_);
  Job* before = nullptr;
  for (Job* at = first_; at != nullptr; before = at, at = at->next_) {
    if (at != job) continue;
    (before == nullptr ? first_ : before->next_) = job->next_;
    if (last_ == job) last_ = before;
    return true;
  }
  return false;
}

Job* JobQueue::pop() {
  const std::scoped_lock held(mutex_);
  Job* job = first_;
  if (job != nullptr) first_ = job->next_;
  return job;
}

void JobQueue::loop() {
  pool_.bind_caller();
  for (;;) {
    const uint32_t seen = submitted_.load();
    while (Job* job = pop()) {
      job->run();
      finished_.add(1);
      finished_.wake(WaitWord::kAll);
    }
    if (stop_.load(std::memory_order_acquire)) return;
    submitted_.wait(seen);
  }
}

Job::Job(Layer& layer, const ForwardArgs& args, const int32_t* num_tokens, const uint32_t* ready,
         uint32_t* done)
    : layer_(layer),
      queue_(layer.jobs()),
      args_(std::make_unique<ForwardArgs>(args)),
      num_tokens_(num_tokens),
      ready_(ready),
      done_(done) {}

Job::~Job() {
  if (queue_.pool_.is_forked()) return;
  is_dropped_.store(true, std::memory_order_release);
  if (!is_ready() && queue_.remove(this)) return;
  wait_until_idle();
}

// Elsewhere nobody runs jobs: waiting for one would never end.
void Job::require_own_process() const {
  if (!queue_.pool_.is_forked()) return;
  throw Error(ErrorCode::kUnsupported,
              "this job's pool lives in the process it was forked from; make a pool here");
}

void Job::submit() {
  require_own_process();
  // Whoever has seen `done` may submit again.
  poll([this] { return state_.load(std::memory_order_acquire) != State::kFinishing; });
  if (state_.load(std::memory_order_acquire) == State::kPending) {
    throw Error(ErrorCode::kInvalidArgument,
                "this job is still pending; wait for it before it is submitted again");
  }
  ++num_submitted_;
  state_.store(State::kPending, std::memory_order_release);
  try {
    queue_.push(this);
  } catch (...) {  // the dispatching thread could not be started
    --num_submitted_;
    state_.store(State::kIdle, std::memory_order_release);
    throw;
  }
}

void Job::wait() {
  require_own_process();
  wait_until_idle();
  const std::scoped_lock held(error_mutex_);
  if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Job::submit_on_stream() noexcept {
  try {
    submit();
  } catch (...) {
    keep(std::current_exception());
  }
}

void Job::wait_on_stream() noexcept { wait_until_idle(); }

void Job::wait_until_idle() const {
  for (;;) {
    const uint32_t seen = queue_.finished_.load();
    if (state_.load(std::memory_order_acquire) == State::kIdle) return;
    queue_.finished_.wait(seen);
  }
}

bool Job::is_ready() const {
  return ready_ == nullptr ||
         has_reached(__atomic_load_n(ready_, __ATOMIC_ACQUIRE), num_submitted_);
}

// In the dispatching thread. The state is the last that is touched: the job may be gone then.
void Job::run() noexcept {
  poll([this] { return is_ready() || is_dropped_.load(std::memory_order_acquire); });
  const uint32_t number = num_submitted_;
  const bool runs = is_ready();
  if (runs) {
    try {
      forward();
    } catch (...) {
      keep(std::current_exception());
    }
  }
  state_.store(State::kFinishing, std::memory_order_release);
  if (runs && done_ != nullptr) __atomic_store_n(done_, number, __ATOMIC_RELEASE);
  state_.store(State::kIdle, std::memory_order_release);
}

void Job::forward() const {
  ForwardArgs args = *args_;
  if (num_tokens_ != nullptr) {
    const int32_t num_tokens = __atomic_load_n(num_tokens_, __ATOMIC_RELAXED);
    if (num_tokens < 0 || static_cast<size_t>(num_tokens) > args.choices.num_tokens) {
      throw Error(ErrorCode::kInvalidArgument, "num_tokens is " + std::to_string(num_tokens) +
                                                   ", but this job takes from 0 to " +
                                                   std::to_string(args.choices.num_tokens));
    }
    args.choices.num_tokens = static_cast<size_t>(num_tokens);
  }
  layer_.forward(args);
}

// The first error since the last wait.
void Job::keep(std::exception_ptr error) noexcept {
  const std::scoped_lock held(error_mutex_);
  if (error_ == nullptr) error_ = std::move(error);
}

}  // namespace ktt
