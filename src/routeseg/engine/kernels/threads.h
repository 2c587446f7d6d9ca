// Threads that share a piece of work, and memory of each of them.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int LINE = 64;  // bytes that memory comes in
constexpr size_t LARGE_PAGE = 2 << 20;
constexpr int PARTS = 8;  // of the work of each thread, so that none waits long for another that was held up

// Workers that wait for the next piece of work: spinning for a moment, since pieces follow each other within
// microseconds, then asleep.
class Pool {
  public:
    // Calls work(task) for every task in 0..tasks, in `threads` threads, this one among them. Throws std::bad_alloc
    // where one of them does.
    template <class Work>
    void run(long tasks, int threads, const Work& work) {
        std::unique_lock<std::mutex> alone(busy, std::defer_lock);
        if (threads <= 1 || tasks <= 1 || !alone.try_lock()) {  // or another thread has the workers
            for (long task = 0; task < tasks; ++task) work(task);
            return;
        }
        const int helpers = hire(std::min(threads - 1, MOST));
        call = [](const void* w, long task) { (*static_cast<const Work*>(w))(task); };
        argument = &work;
        total = tasks;
        next.store(0, std::memory_order_relaxed);
        failed.store(false, std::memory_order_relaxed);
        running.store(helpers, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> guard(lock);
            turn.store((turn.load() / (MOST + 1) + 1) * (MOST + 1) + helpers, std::memory_order_release);
        }
        wake.notify_all();
        take();
        for (long spin = 0; running.load(std::memory_order_acquire) > 0; ++spin) pause(spin);
        if (failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
    }

    // Calls work(y) for every row y of 0..h; neighbours in the same thread, since they read the same rows.
    template <class Work>
    void rows(long h, int threads, const Work& work) {
        const long parts = std::min(h, long(threads) * PARTS);
        run(parts, threads, [&](long part) {
            for (long y = part * h / parts; y < (part + 1) * h / parts; ++y) work(y);
        });
    }

  private:
    static constexpr long SPINS = 10000;  // some 200 microseconds
    static constexpr int MOST = 0xffff;   // helpers of a piece of work

    static void pause(long spin) {
        if (spin > SPINS) {
            std::this_thread::yield();  // somebody else needs this core: perhaps the worker that is waited for
            return;
        }
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // So many workers, or as many as the system gives.
    int hire(int wanted) {
        try {
            for (; workers < wanted; ++workers)
                std::thread([this, number = workers] { serve(number); }).detach();
        } catch (const std::system_error&) {
        }
        return std::min(wanted, workers);
    }

    void take() {
        try {
            for (long task; (task = next.fetch_add(1, std::memory_order_relaxed)) < total;) call(argument, task);
        } catch (const std::bad_alloc&) {
            failed.store(true, std::memory_order_relaxed);
            next.store(total, std::memory_order_relaxed);
        }
    }

    // `number` counts from 0. Which turn it is and how many help in it are read at once, so that a worker that is late
    // does not take part in a turn that is over.
    void serve(int number) {
        for (uint64_t seen = 0;;) {
            for (long spin = 0; spin < SPINS && turn.load(std::memory_order_acquire) == seen; ++spin) pause(spin);
            if (turn.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> guard(lock);
                wake.wait(guard, [&] { return turn.load(std::memory_order_acquire) != seen; });
            }
            seen = turn.load(std::memory_order_acquire);
            if (number < int(seen % (MOST + 1))) {
                take();
                running.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    std::mutex busy, lock;
    std::condition_variable wake;
    int workers = 0;
    std::atomic<uint64_t> turn{0};  // counts pieces of work, times MOST + 1, plus the helpers of this one
    std::atomic<long> next{0};
    std::atomic<int> running{0};
    std::atomic<bool> failed{false};
    void (*call)(const void*, long) = nullptr;
    const void* argument = nullptr;
    long total = 0;
};

// A forked child has none of its parent's threads: it starts with a pool of its own.
Pool* pool = nullptr;
void new_pool() { pool = new Pool(); }
__attribute__((constructor)) void on_load() {
    new_pool();
    pthread_atfork(nullptr, nullptr, new_pool);
}

// Memory of this thread for one use at a time; grows, never shrinks.
char* scratch(size_t bytes) {
    thread_local std::vector<char> own;
    if (own.size() < bytes + LINE) own.resize(bytes + LINE);
    return own.data() + (LINE - reinterpret_cast<uintptr_t>(own.data()) % LINE) % LINE;
}

// Asks for memory in large pages: fresh memory in small ones costs more time than what is written there.
void large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (bytes < LARGE_PAGE) return;
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
