// Threads that share a piece of work, and memory of each of them.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
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

// Another pool whose threads work here too, or null: it calls function(data) in `threads` threads at once, the caller
// among them. PyTorch's threads spin between its operations, and would take the cores from workers of our own.
typedef void (*Parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
Parallel shared_threads = nullptr;

// Workers that help whoever has a piece of work, also several threads at once: they spin for a moment, since pieces
// follow each other within microseconds, then sleep.
//
// A caller always works at its own piece, and waits for nobody but the helpers that are inside it. A worker that is
// free goes to the piece that has the fewest helpers, of these to the oldest: a piece that nobody helps is never passed
// over for one that was posted after it.
class Pool {
  public:
    // Calls work(task) for every task in 0..tasks, in up to `threads` threads, this one among them. Throws what one of
    // them throws; the tasks that nobody has begun are then left out.
    template <class Work>
    void run(long tasks, int threads, const Work& work) {
        if (threads <= 1 || tasks <= 1) {
            for (long task = 0; task < tasks; ++task) work(task);
            return;
        }
        Piece piece{[](const void* w, long task) { (*static_cast<const Work*>(w))(task); }, &work, tasks,
                    std::min(threads - 1, MOST)};
        if (shared_threads) {
            const long wanted = std::min<long>(threads, tasks);
            shared_threads([](void* p) { static_cast<Piece*>(p)->take(); }, &piece, unsigned(wanted), 0);
            if (piece.failure) std::rethrow_exception(piece.failure);
            return;
        }
        post(piece);
        piece.take();
        withdraw(piece);
        for (long spin = 0; piece.helpers.load(std::memory_order_acquire) > 0; ++spin) pause(spin);
        if (piece.failure) std::rethrow_exception(piece.failure);
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
    static constexpr int MOST = 1023;     // helpers of a piece of work

    // A piece of work, in the memory of its caller, who leaves it when it is withdrawn and the last helper has gone.
    struct Piece {
        void (*call)(const void*, long);
        const void* argument;
        long total;
        int wanted;                   // helpers, at most
        std::atomic<long> next{0};    // task that nobody has begun
        std::atomic<int> helpers{0};  // inside; a helper touches nothing of the piece once it has left
        std::atomic<bool> failed{false};
        std::exception_ptr failure{};  // of whoever set `failed`
        Piece *before = nullptr, *after = nullptr;

        void take() {
            try {
                for (long task; (task = next.fetch_add(1, std::memory_order_relaxed)) < total;) call(argument, task);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
                next.store(total, std::memory_order_relaxed);
            }
        }
    };

    // Guards the list of pieces, for some ten instructions at a time: putting a thread to sleep would cost more.
    class Latch {
      public:
        explicit Latch(std::atomic<bool>& taken) : taken(taken) {
            for (long spin = 0; taken.exchange(true, std::memory_order_acquire); ++spin) pause(spin);
        }
        ~Latch() { taken.store(false, std::memory_order_release); }

      private:
        std::atomic<bool>& taken;
    };

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

    void post(Piece& piece) {
        {
            Latch latch(listing);
            piece.before = newest;
            (newest ? newest->after : oldest) = &piece;
            newest = &piece;
        }
        {
            std::lock_guard<std::mutex> guard(lock);
            hire(piece.wanted);
            posted.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
    }

    void withdraw(Piece& piece) {
        Latch latch(listing);
        (piece.before ? piece.before->after : oldest) = piece.after;
        (piece.after ? piece.after->before : newest) = piece.before;
    }

    // So many workers, or as many as the system gives. Callers share them.
    void hire(int wanted) {
        try {
            for (; workers < wanted; ++workers) std::thread([this] { serve(); }).detach();
        } catch (const std::exception&) {  // std::system_error or std::bad_alloc: fewer must do
        }
    }

    // The piece that a free worker goes to, or null; the worker is inside it then.
    Piece* join() {
        Latch latch(listing);
        Piece* neediest = nullptr;
        int fewest = 0;
        for (Piece* piece = oldest; piece; piece = piece->after) {
            const int helpers = piece->helpers.load(std::memory_order_relaxed);
            const bool open = piece->next.load(std::memory_order_relaxed) < piece->total && helpers < piece->wanted;
            if (open && (!neediest || helpers < fewest)) neediest = piece, fewest = helpers;
        }
        if (neediest) neediest->helpers.fetch_add(1, std::memory_order_relaxed);
        return neediest;
    }

    void serve() {
        for (;;) {
            const uint64_t seen = posted.load(std::memory_order_acquire);  // before the list: what comes later differs
            while (Piece* piece = join()) {
                piece->take();
                piece->helpers.fetch_sub(1, std::memory_order_release);
            }
            for (long spin = 0; spin < SPINS && posted.load(std::memory_order_acquire) == seen; ++spin) pause(spin);
            if (posted.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> guard(lock);
                wake.wait(guard, [&] { return posted.load(std::memory_order_acquire) != seen; });
            }
        }
    }

    std::atomic<bool> listing{false};
    Piece *oldest = nullptr, *newest = nullptr;
    std::mutex lock;  // of those who sleep
    std::condition_variable wake;
    int workers = 0;
    std::atomic<uint64_t> posted{0};  // pieces of work, so far
};

// A forked child has none of its parent's threads, and a pool that it shared would wait for them: it starts with a pool
// of its own.
Pool* pool = nullptr;
void new_pool() {
    pool = new Pool();
    shared_threads = nullptr;
}
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
