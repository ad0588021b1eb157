//! The reading end of a BPF ring buffer (Documentation/bpf/ringbuf.rst): a page with the reader's position, a page with
//! the kernel's, and the data, which is mapped twice in a row, so that a record that wraps around lies in one piece.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::core::refusal::Refusal;
use crate::sys::bpf::Map;

/// Flags in a record's length (`BPF_RINGBUF_BUSY_BIT`, `BPF_RINGBUF_DISCARD_BIT`): it is being written; it is to be
/// passed over.
const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
/// Length and an offset that is the kernel's own (`BPF_RINGBUF_HDR_SZ`).
const HEADER: usize = 8;

/// The ring of refusals, to read from.
///
/// Whoever waits for it edge-triggered must [`Ring::take`] all after each event: the kernel wakes nobody up before its
/// reader has caught up with it.
#[derive(Debug)]
pub struct Ring {
    fd: OwnedFd,
    id: u32,
    consumer: Mapping,
    /// The kernel's position, and the data twice.
    producer: Mapping,
    page: usize,
}

impl Ring {
    /// Opens the reading end of a map of this type.
    pub(super) fn open(map: &Map) -> io::Result<Ring> {
        let (page, size) = (rustix::param::page_size(), map.capacity()? as usize);
        if !size.is_power_of_two() || size % page != 0 {
            return Err(io::Error::other("it is no ring"));
        }
        let consumer = Mapping::new(map.as_fd(), page, ProtFlags::READ | ProtFlags::WRITE, 0)?;
        let producer = Mapping::new(map.as_fd(), page + 2 * size, ProtFlags::READ, page)?;
        Ok(Ring { fd: map.as_fd().try_clone_to_owned()?, id: map.id()?, consumer, producer, page })
    }

    /// The kernel's id of the map.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Takes all that is there, oldest first.
    pub fn take(&mut self) -> Vec<Refusal> {
        let mut taken = Vec::new();
        // SAFETY: each mapping starts with an `unsigned long` and lives as long as `self`; what the kernel changes in it
        // is only read atomically.
        let (consumer, producer) = unsafe { (self.consumer.start::<AtomicUsize>(), self.producer.start()) };
        // SAFETY: the data follows the producer's page and goes on to the mapping's end; it is only read.
        let data = unsafe {
            let start = self.producer.address.byte_add(self.page).cast::<AtomicU32>();
            std::slice::from_raw_parts(start.as_ptr(), (self.producer.length - self.page) / 4)
        };
        drain(consumer, producer, data, |record| taken.extend(Refusal::parse(record)));
        taken
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Hands on each record from the reader's position to the kernel's. `data` is the ring, twice.
fn drain(consumer: &AtomicUsize, producer: &AtomicUsize, data: &[AtomicU32], mut record: impl FnMut(&[u8])) {
    let size = data.len() * 4 / 2;
    let mut at = consumer.load(Ordering::Relaxed);
    loop {
        // The kernel writes its position or a record's length, and then reads ours to know whether to wake us up
        // (bpf_ringbuf_commit). With the two in the other order here, one of us sees what the other one wrote.
        fence(Ordering::SeqCst);
        let end = producer.load(Ordering::Acquire);
        let left = end.wrapping_sub(at);
        if left == 0 {
            return;
        }
        let start = (at & (size - 1)) / 4;
        let header = data[start].load(Ordering::Acquire);
        let length = (header & !(BUSY | DISCARD)) as usize;
        let step = (HEADER + length).next_multiple_of(8);
        if left > size || at % 8 != 0 || (header & BUSY == 0 && step > left) {
            // Somebody else has moved our position: what is there cannot be told apart.
            consumer.store(end, Ordering::Release);
            return;
        }
        if header & BUSY != 0 {
            return;
        }
        if header & DISCARD == 0 {
            let words = &data[start + HEADER / 4..start + HEADER / 4 + length.div_ceil(4)];
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
            record(&bytes[..length]);
        }
        at = at.wrapping_add(step);
        consumer.store(at, Ordering::Release);
    }
}

/// A part of a map in this process's memory.
#[derive(Debug)]
struct Mapping {
    address: NonNull<std::ffi::c_void>,
    length: usize,
}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, length: usize, access: ProtFlags, offset: usize) -> io::Result<Mapping> {
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let address = unsafe { mmap(null_mut(), length, access, MapFlags::SHARED, fd, offset as u64)? };
        Ok(Mapping { address: NonNull::new(address).expect("nothing is mapped at 0"), length })
    }

    /// # Safety
    /// A `T` must be there, and may be changed by others only as far as `T` is made for it.
    unsafe fn start<T>(&self) -> &T {
        // SAFETY: as the caller says; a mapping starts at a page's begin, so it is aligned.
        unsafe { self.address.cast::<T>().as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it any more.
        let _ = unsafe { munmap(self.address.as_ptr(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: usize = 256;

    /// A ring as the kernel writes it.
    struct Kernel {
        consumer: AtomicUsize,
        producer: AtomicUsize,
        data: Vec<AtomicU32>,
    }

    impl Kernel {
        fn new(position: usize) -> Kernel {
            let data = (0..SIZE / 2).map(|_| AtomicU32::new(0)).collect();
            Kernel { consumer: AtomicUsize::new(position), producer: AtomicUsize::new(position), data }
        }

        /// Both copies show it.
        fn put(&self, position: usize, word: u32) {
            let at = (position & (SIZE - 1)) / 4;
            self.data[at].store(word, Ordering::Relaxed);
            self.data[at + SIZE / 4].store(word, Ordering::Relaxed);
        }

        fn write(&self, bytes: &[u8], flags: u32) -> bool {
            let start = self.producer.load(Ordering::Relaxed);
            let end = start.wrapping_add((HEADER + bytes.len()).next_multiple_of(8));
            if end.wrapping_sub(self.consumer.load(Ordering::Relaxed)) > SIZE - 1 {
                return false;
            }
            for (index, word) in bytes.chunks(4).enumerate() {
                let mut padded = [0; 4];
                padded[..word.len()].copy_from_slice(word);
                self.put(start.wrapping_add(HEADER + 4 * index), u32::from_ne_bytes(padded));
            }
            self.put(start, bytes.len() as u32 | flags);
            self.producer.store(end, Ordering::Release);
            true
        }

        fn read(&self) -> Vec<Vec<u8>> {
            let mut records = Vec::new();
            drain(&self.consumer, &self.producer, &self.data, |record| records.push(record.to_vec()));
            records
        }
    }

    #[test]
    fn a_record_that_is_being_written_is_waited_for() {
        let ring = Kernel::new(usize::MAX - 31);
        ring.write(b"before", 0);
        let position = ring.producer.load(Ordering::Relaxed);
        ring.write(b"busy", BUSY);
        ring.write(b"after", 0);
        assert_eq!(ring.read(), [b"before"]);
        assert!(ring.read().is_empty());
        ring.put(position, 4);
        assert_eq!(ring.read(), [&b"busy"[..], b"after"]);
        assert_eq!(ring.consumer.load(Ordering::Relaxed), ring.producer.load(Ordering::Relaxed));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_in_order(
            start in 0..1000usize,
            turns in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..40), any::<bool>(), any::<bool>()), 0..100),
        ) {
            // Also past the position's own end.
            let ring = Kernel::new((usize::MAX - 1000 + start) & !7);
            let (mut written, mut read) = (Vec::new(), Vec::new());
            for (bytes, discarded, reads) in turns {
                if ring.write(&bytes, if discarded { DISCARD } else { 0 }) && !discarded {
                    written.push(bytes);
                }
                if reads {
                    read.extend(ring.read());
                }
            }
            read.extend(ring.read());
            prop_assert_eq!(written, read);
        }

        #[test]
        fn no_state_of_the_memory_panics_or_hangs(
            consumer in any::<usize>(),
            ahead in prop_oneof![0..600usize, any::<usize>()],
            words in proptest::collection::vec(prop_oneof![0..600u32, any::<u32>()], SIZE / 2),
        ) {
            let ring = Kernel::new(consumer);
            ring.producer.store(consumer.wrapping_add(ahead), Ordering::Relaxed);
            ring.data.iter().zip(words).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
            for record in ring.read() {
                prop_assert!(record.len() <= SIZE);
            }
        }
    }
}
