// Threads. Torch's own OpenMP runtime, where Python has found it (sordino_openmp): its threads wait actively for more work when a
// torch operation is done, and a second set of threads would have to share the processors with them. Without it a small pool.
//
// Workers wait actively for a moment (decode sends thousands of short jobs a second) and then sleep. Pieces of work are
// taken one by one from a counter, so a thread that the machine holds up does not hold up the others.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

#include "products.h"

namespace sordino {
namespace {

// GOMP_parallel, as GNU's, Intel's and LLVM's runtimes have it.
using OpenMp = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
std::atomic<OpenMp> openmp{nullptr};

constexpr auto kPatience = std::chrono::microseconds(60);  // of active waiting: longer than torch takes between two linears

struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t n;

  // Does pieces that nobody has taken yet; `next` is the first of them.
  void take(std::atomic<int64_t>& next) const {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(context, i);
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits actively, then lets others have the processor in between.
template <class Done>
void wait_until(Done done) {
  constexpr int kSpins = 1 << 14;
  for (int spin = 0; !done(); ++spin) {
    if (spin < kSpins) pause();
    else std::this_thread::yield();
  }
}

// One job after another, for threads that follow them.
struct Team {
  std::atomic<uint64_t> round{0};       // grows by one a job
  std::atomic<int64_t> next{0};         // piece to take
  std::atomic<int> places{0}, busy{0};  // followers that may still join this job; those inside it
  Job job{};

  // Does a job together with up to `others` followers; `call` makes `round` grow.
  template <class Call>
  void lead(const Job& wanted, int others, Call call) {
    job = wanted;
    next.store(0, std::memory_order_relaxed);
    places.store(others);
    call();
    job.take(next);
    places.store(0);
    wait_until([&] { return busy.load() == 0; });
  }

  // `busy` first, then look whether the job is still open: lead() closes it before it waits for `busy` to be zero.
  void join() {
    busy.fetch_add(1);
    if (places.fetch_sub(1) > 0) job.take(next);
    busy.fetch_sub(1);
  }
};

struct Pool {
  std::mutex callers;  // one job at a time
  std::mutex lock;
  std::condition_variable wake;
  Team team;
  int workers = 0, sleeping = 0;

  void await(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kPatience;
    for (int spin = 0; team.round.load(std::memory_order_acquire) == seen; ++spin) {
      pause();
      if (spin % 64 == 63 && std::chrono::steady_clock::now() > until) {
        std::unique_lock<std::mutex> hold(lock);
        ++sleeping;
        wake.wait(hold, [&] { return team.round.load() != seen; });
        --sleeping;
      }
    }
  }

  void work(uint64_t seen) {
    for (;;) {
      await(seen);
      seen = team.round.load(std::memory_order_acquire);
      team.join();
    }
  }

  void run(const Job& wanted, int threads) {
    team.lead(wanted, threads - 1, [&] {
      std::lock_guard<std::mutex> hold(lock);
      for (; workers < threads - 1; ++workers) std::thread([this, seen = team.round.load()] { work(seen); }).detach();
      team.round.fetch_add(1);
      if (sleeping > 0) wake.notify_all();
    });
  }
};

// OpenMP's threads while one call sends many jobs: they stay in one parallel region, since its beginning and end cost some
// microseconds each.
struct Crew {
  Team team;
  std::atomic<bool> over{false};

  void run(const Job& wanted, int threads) {
    team.lead(wanted, threads - 1, [&] { team.round.fetch_add(1); });
  }

  void follow() {
    for (uint64_t seen = 0;;) {
      wait_until([&] { return team.round.load(std::memory_order_acquire) != seen; });
      seen = team.round.load(std::memory_order_acquire);
      if (over.load()) return;  // set before `round` grew for the last time
      team.join();
    }
  }

  void dismiss() {
    over = true;
    team.round.fetch_add(1);
  }
};

thread_local Crew* crew = nullptr;  // of the call that this thread is in

// Never destroyed: detached workers may outlive main's statics.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
#ifndef _WIN32
    // A forked child has the memory of the pool but none of its threads.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
  });
  return pool;
}

}  // namespace

void parallel(int64_t n, int threads, void (*body)(void*, int64_t), void* context) {
  if (threads > n) threads = static_cast<int>(n);
  if (crew != nullptr && threads > 1) return crew->run({body, context, n}, threads);
  if (const OpenMp run = openmp.load(std::memory_order_relaxed); run != nullptr && threads > 1) {
    struct Shared {
      Job job;
      std::atomic<int64_t> next{0};
    } shared{{body, context, n}};
    const auto part = [](void* of) { static_cast<Shared*>(of)->job.take(static_cast<Shared*>(of)->next); };
    return run(part, &shared, static_cast<unsigned>(threads), 0);
  }
  Pool* shared = threads > 1 ? the_pool() : nullptr;
  if (shared == nullptr || !shared->callers.try_lock()) {  // another caller has the pool: do it alone
    for (int64_t i = 0; i < n; ++i) body(context, i);
    return;
  }
  shared->run({body, context, n}, threads);
  shared->callers.unlock();
}

void with_crew(int threads, void (*body)(void*), void* context) {
  const OpenMp run = openmp.load(std::memory_order_relaxed);
  if (run == nullptr || threads <= 1 || crew != nullptr) return body(context);
  struct Shared {
    void (*body)(void*);
    void* context;
    std::thread::id captain;
    Crew crew;
  } shared{body, context, std::this_thread::get_id(), {}};
  const auto part = [](void* of) {
    Shared& mine = *static_cast<Shared*>(of);
    if (std::this_thread::get_id() != mine.captain) return mine.crew.follow();
    crew = &mine.crew;
    mine.body(mine.context);
    crew = nullptr;
    mine.crew.dismiss();
  };
  run(part, &shared, static_cast<unsigned>(threads), 0);
}

// Address of GOMP_parallel of the runtime that torch uses; null for the pool here.
SORDINO_API int sordino_openmp(void* parallel) {
  openmp = reinterpret_cast<OpenMp>(parallel);
#ifndef _WIN32
  // A forked child has none of the runtime's threads, and would wait for them.
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { openmp = nullptr; }); });
#endif
  return 0;
}

}  // namespace sordino
