// Working memory that stays with the process: the first touch of new pages can cost more than what is done with them.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <new>

namespace loft_fast {

class Kept {
  public:
    static void* take(size_t bytes) {
        Kept& kept = instance();
        {
            const std::lock_guard<std::mutex> lock(kept.mutex_);
            for (auto block = kept.blocks_.begin(); block != kept.blocks_.end(); ++block)
                if (block->bytes == bytes) {
                    void* data = block->data;
                    kept.bytes_ -= bytes;
                    kept.blocks_.erase(block);
                    return data;
                }
        }
        return ::operator new(bytes, kAlignment);
    }

    static void give(void* data, size_t bytes) noexcept {
        Kept& kept = instance();
        const std::lock_guard<std::mutex> lock(kept.mutex_);
        try {
            kept.blocks_.push_back({data, bytes});
        } catch (const std::bad_alloc&) {
            return ::operator delete(data, kAlignment);
        }
        for (kept.bytes_ += bytes; kept.bytes_ > kMost; kept.blocks_.pop_front()) {
            kept.bytes_ -= kept.blocks_.front().bytes;
            ::operator delete(kept.blocks_.front().data, kAlignment);
        }
    }

  private:
    struct Block {
        void* data;
        size_t bytes;
    };
    static constexpr size_t kMost = 64 << 20;        // bytes
    static constexpr std::align_val_t kAlignment{64};  // a whole vector never straddles two cache lines

    static Kept& instance() {
        static Kept* kept = new Kept;  // never destroyed: threads may outlive static objects
        return *kept;
    }

    std::mutex mutex_;
    std::deque<Block> blocks_;
    size_t bytes_ = 0;
};

// `size` elements, not initialised.
template <typename T>
class Aligned {
  public:
    explicit Aligned(int64_t size) : Aligned(static_cast<size_t>(size) * sizeof(T)) {}
    T* get() const { return data_.get(); }

  private:
    struct Give {
        size_t bytes;
        void operator()(T* data) const { Kept::give(data, bytes); }
    };
    explicit Aligned(size_t bytes) : data_(static_cast<T*>(Kept::take(bytes)), Give{bytes}) {}
    std::unique_ptr<T[], Give> data_;
};

}  // namespace loft_fast
