#include "workers.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace onnx_quarot {
namespace {

// How long a thread looks for what it waits for before it sleeps: to be woken takes tens of microseconds, as long as
// many a call. After a moment it offers its CPU to others at every look; at once if there is no other CPU to wait for.
constexpr std::chrono::microseconds kMoment{50}, kPatience{500};

template <class Condition>
void look_for(Condition met) {
  using Clock = std::chrono::steady_clock;
  static const bool several = std::thread::hardware_concurrency() > 1;
  const Clock::time_point start = Clock::now();
  for (Clock::time_point now = start; !met() && now < start + kPatience; now = Clock::now()) {
    if (!several || now > start + kMoment) std::this_thread::yield();
  }
}

// One call of run_parts, on its stack.
struct Call {
  const std::function<void(std::size_t)>& part;
  std::size_t count;
  std::size_t wanted;                   // threads that may still join; the crew's mutex guards it, and `error`
  std::atomic<std::size_t> next{0};     // the first part nobody has taken
  std::atomic<std::size_t> helpers{0};  // threads that have joined and not left
  std::exception_ptr error{};
};

class Crew {
 public:
  void run(Call& call) {
    open(call);
    std::exception_ptr error = work(call);
    close(call);
    if (!error) error = call.error;
    if (error) std::rethrow_exception(error);
  }

 private:
  static std::exception_ptr work(Call& call) {
    try {
      for (std::size_t i = call.next++; i < call.count; i = call.next++) call.part(i);
    } catch (...) {
      return std::current_exception();
    }
    return nullptr;
  }

  void open(Call& call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.push_back(&call);
    std::size_t wanted = 0;
    for (const Call* each : calls_) wanted += each->wanted;
    for (; free_ < wanted; ++free_) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::exception&) {
        break;  // no more threads to be had: the others do the work
      }
    }
    ++opened_;
    for (std::size_t i = 0; i < call.wanted; ++i) called_.notify_one();
  }

  void close(Call& call) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      calls_.erase(std::remove(calls_.begin(), calls_.end(), &call), calls_.end());
    }
    const auto alone = [&] { return call.helpers.load() == 0; };
    look_for(alone);
    std::unique_lock<std::mutex> lock(mutex_);
    left_.wait(lock, alone);
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      while (calls_.empty()) {
        const std::uint64_t seen = opened_.load();
        lock.unlock();
        look_for([&] { return opened_.load() != seen; });
        lock.lock();
        // Woken for a call that has gone meanwhile, it looks for the next one.
        if (opened_.load() == seen) called_.wait(lock);
      }
      Call& call = *calls_.front();
      if (--call.wanted == 0) calls_.erase(calls_.begin());
      ++call.helpers;
      --free_;
      lock.unlock();
      const std::exception_ptr error = work(call);
      lock.lock();
      ++free_;
      if (error) call.error = error;
      if (--call.helpers == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable called_, left_;
  std::vector<Call*> calls_;  // those that want more threads
  std::size_t free_ = 0;      // threads that are in no call
  std::atomic<std::uint64_t> opened_{0};
};

// Never destroyed: its threads wait in it until the process ends.
std::atomic<Crew*> current{nullptr};

Crew& crew() {
  static std::once_flag once;
  std::call_once(once, [] {
    current = new Crew;
#if defined(__unix__) || defined(__APPLE__)
    // A forked process has none of the threads, and the mutex as it was.
    pthread_atfork(nullptr, nullptr, [] { current = new Crew; });
#endif
  });
  return *current;
}

}  // namespace

void run_parts(std::size_t count, std::size_t threads, const std::function<void(std::size_t)>& part) {
  const std::size_t together = std::min(count, threads);
  if (together > 1) {
    Call call{part, count, together - 1};
    return crew().run(call);
  }
  for (std::size_t i = 0; i < count; ++i) part(i);
}

}  // namespace onnx_quarot
