// A file opened for reading, by memory map or by system calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory>
#include <span>
#include <string>

#include <sys/stat.h>

namespace megatron_bert {

/// How a file's bytes are read: by memory map if the system grants one, or always by pread.
enum class FileAccess { map, read };

/// A file whose bytes must not change while it is open.
///
/// A mapped file needs no system call per read and no descriptor. Some filesystems and limits
/// refuse maps (ENODEV, ENOMEM, EACCES, ...); then, as with FileAccess::read, the descriptor is
/// kept and bytes are read on demand. Const methods are thread-safe.
class StoredFile {
  public:
    /// Throws std::system_error, naming the file, if it cannot be opened.
    StoredFile(std::string path, FileAccess access);
    ~StoredFile();

    StoredFile(const StoredFile&) = delete;
    StoredFile& operator=(const StoredFile&) = delete;

    const std::string& path() const noexcept { return path_; }
    std::size_t size() const noexcept { return static_cast<std::size_t>(state_.size); }

    /// The first byte; nullptr for a file that is not mapped, and for an empty one.
    const std::byte* mapped() const noexcept { return mapped_; }

    /// Whether reads need no system call. (An empty file has nothing to map or to read.)
    bool is_mapped() const noexcept { return mapped_ != nullptr || size() == 0; }

    /// Reads bytes of a file that is not mapped.
    /// Throws std::system_error, naming the file and the offset, if they cannot be read, and
    /// std::runtime_error if the file ends before them.
    void read(std::size_t offset, std::span<std::byte> bytes) const;

    /// All bytes: the map or, without one, a copy that the object keeps.
    /// Throws as `read`, and std::runtime_error if memory cannot hold the copy. Not thread-safe.
    std::span<const std::byte> whole();

    /// Turns off read-ahead for a mapped file.
    void expect_random_reads() const noexcept;

    /// Throws std::runtime_error, saying what happened, unless the path still names this file with
    /// the size and modification time that it had when it was opened.
    ///
    /// Costs one system call. It finds changes only after the fact: a truncated map raises SIGBUS
    /// if it is read beyond its end before the next check.
    void check_unchanged() const;

  private:
    struct State {
        ::dev_t device = 0;
        ::ino_t inode = 0;
        std::int64_t size = 0;
        std::time_t modified_seconds = 0;
        long modified_nanoseconds = 0;

        friend bool operator==(const State&, const State&) = default;
    };

    static State state_of(const struct ::stat& status) noexcept;
    [[noreturn]] void fail(int error, const std::string& what) const;

    std::string path_;
    std::string absolute_path_;  ///< the working directory may change
    State state_;
    int descriptor_ = -1;  ///< kept only if the file is not mapped
    const std::byte* mapped_ = nullptr;
    std::unique_ptr<std::byte[]> copy_;
};

}  // namespace megatron_bert
