//! The two device programs, as instructions.
//!
//! The kernel runs every device program of a task's cgroup and of its ancestors, the leaf's first and the root's last,
//! and hands the verdict on: 0, or a negative errno (`bpf_prog_run_array_cg` in kernel/bpf/cgroup.c). An earlier error
//! is kept when a later program refuses too.
//!
//! - [`lift`] sits on the cgroup2 root, so it runs last. It reads the verdict, and where that is a refusal and the map
//!   of grants holds (cgroup, device, access) for an ancestor of the task, it lifts it. While rights are *withdrawn*
//!   (the runtime's own filter grants them since the container's start, and their device is unplugged), a second form of
//!   it is attached, which takes what the map of withdrawals holds for a refusal. Without that map it can never deny.
//! - [`mark`] sits in first place on a granted container's cgroup. A refusal that it sees comes from *below* the
//!   container: from a filter that a nested container or a unit has of its own. It turns that `-EPERM` into
//!   `-(2000 + level)`, so that [`lift`] does not open the outer container's devices to the inner one.
//!
//! A runtime's update may detach all programs of a container, [`mark`] among them. Then a refusal from below would look
//! like the container's own. So [`mark`] also leaves a *witness* of having run, one word in a per-CPU slot that [`lift`]
//! reads and clears at each verdict: without it, a grant holds for tasks in the container's own cgroup alone. A witness
//! is lost when another task opens a device on this CPU between the two programs, which needs a preemption within less
//! than a microsecond: then a task below the container's cgroup is refused once.
//!
//! Where [`lift`] leaves a refusal as it is, and an ancestor of the task is in the map of those that are *watched*, it
//! reports who was refused what. An open that is let through executes nothing of this.

use crate::core::assembler::{
    ADD, AND, Assembler, DW, JEQ, JGT, JNE, LSH, OR, R0, R1, R2, R3, R4, R6, R7, R8, R9, R10, RSH, SUB, W, XOR,
};
pub use crate::core::assembler::{Insn, assemble};

/// Version of the maps' layout; part of the names, so that a newer binary knows an older one's maps.
pub const LAYOUT: u32 = 1;
/// Name of the map of grants.
pub const GRANTS_MAP: &str = "qmhp_grants1";
/// Name of the map of witnesses.
pub const WITNESS_MAP: &str = "qmhp_witness1";
/// Name of the map of withdrawals.
pub const WITHDRAWN_MAP: &str = "qmhp_withdraw1";
/// Name of the map of watched cgroups.
pub const WATCHED_MAP: &str = "qmhp_watch1";
/// Name of the ring of refusals.
pub const REFUSED_MAP: &str = "qmhp_refused1";
/// What the names of all versions of [`lift`] start with.
pub const LIFT_PREFIX: &str = "qmhp_lift";
/// What the names of all versions of [`mark`] start with.
pub const MARK_PREFIX: &str = "qmhp_mark";

/// A grant's or a withdrawal's key: cgroup id (u64), kind (`BPF_DEVCG_DEV_*`), major, minor, zero; in the byte order of the machine.
pub const KEY_SIZE: usize = 24;
/// Their value: `BPF_DEVCG_ACC_*` bits (u32).
pub const VALUE_SIZE: usize = 4;
/// A witness: the task's id (the lower half of `bpf_get_current_pid_tgid`) in the upper half, the levels whose marks
/// ran for it as a bit set in the lower one. One word, because a task can be preempted between two.
pub const WITNESS_SIZE: usize = 8;

/// Key of the map of watched cgroups: the cgroup's id (u64).
pub const WATCHED_KEY_SIZE: usize = 8;
/// Its value: the window of time of the last report in the upper half, the reports in it in the lower one (u64).
pub const WATCHED_VALUE_SIZE: usize = 8;
/// A window of time is this power of two of nanoseconds long: 1.07 seconds.
const WINDOW_SHIFT: i32 = 30;
/// Reports that a watched cgroup may make in a window. Two CPUs that report at once may make one more.
pub const REPORTS_PER_WINDOW: u32 = 16;

/// Ancestor levels that [`lift`] looks at: a container's cgroup must be less deep than this.
pub const MAX_LEVELS: u32 = 32;
/// `-(MARK_BASE + level)` is the verdict of a refusal from below a marked cgroup of that level.
pub const MARK_BASE: i32 = 2000;

const EPERM: i32 = -1;

/// Where the fields of `struct bpf_cgroup_dev_ctx` are.
const CTX_ACCESS_TYPE: i16 = 0;
const CTX_MAJOR: i16 = 4;
const CTX_MINOR: i16 = 8;

/// Helper numbers (linux/bpf.h, `enum bpf_func_id`).
mod helper {
    pub(super) const KTIME_GET_NS: i32 = 5;
    pub(super) const GET_CURRENT_PID_TGID: i32 = 14;
    pub(super) const GET_CURRENT_CGROUP_ID: i32 = 80;
    pub(super) const GET_CURRENT_ANCESTOR_CGROUP_ID: i32 = 123;
    pub(super) const RINGBUF_OUTPUT: i32 = 130;
    pub(super) const GET_RETVAL: i32 = 186;
    pub(super) const SET_RETVAL: i32 = 187;
}

/// File descriptors of the maps that [`lift`] works on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Maps {
    /// Grants.
    pub grants: i32,
    /// Witnesses.
    pub witness: i32,
    /// Withdrawals, while there are any.
    pub withdrawn: Option<i32>,
    /// Watched cgroups.
    pub watched: i32,
    /// The ring of refusals.
    pub refused: i32,
}

/// The program for the cgroup2 root.
pub fn lift(maps: Maps) -> Vec<Insn> {
    const INDEX: i16 = -4;
    let mut a = Assembler::default();
    a.mov(R6, R1);
    // R9 = the witness. The slot is cleared for the next verdict.
    a.store_imm(W, R10, INDEX, 0);
    a.lookup(maps.witness, INDEX);
    a.jump_imm(JEQ, R0, 0, "leave");
    a.load(DW, R9, R0, 0);
    a.store_imm(DW, R0, 0, 0);

    // R7 = levels to look at: all for a plain refusal, those below the mark for a renamed one.
    a.call(helper::GET_RETVAL);
    a.jump32_imm(JEQ, R0, 0, if maps.withdrawn.is_some() { "allowed" } else { "leave" });
    a.mov_imm(R7, -1);
    a.jump32_imm(JEQ, R0, EPERM, "wanted");
    a.mov32(R1, R0);
    a.alu32_imm(ADD, R1, MARK_BASE);
    a.neg32(R1);
    a.jump32_imm(JGT, R1, MAX_LEVELS as i32 - 1, "leave");
    a.alu32_imm(ADD, R1, 1);
    a.alu64(LSH, R7, R1);

    // R9 = the levels whose marks ran, or none if the witness is another task's. Without a branch: a value that is known
    // on one path and not on another doubles what the verifier walks.
    a.label("wanted");
    a.call(helper::GET_CURRENT_PID_TGID);
    a.mov32(R0, R0);
    a.mov(R1, R9);
    a.alu64_imm(RSH, R1, 32);
    a.alu64(XOR, R0, R1);
    a.mov(R1, R0);
    a.neg64(R1);
    a.alu64(OR, R0, R1);
    a.alu64_imm(RSH, R0, 63);
    a.alu64_imm(SUB, R0, 1);
    a.alu64(AND, R9, R0);

    question(&mut a);
    a.mov_imm(R8, 1);
    a.label("level");
    a.jump32_imm(JGT, R8, MAX_LEVELS as i32 - 1, "refuse");
    a.mov(R1, R7);
    a.alu64(RSH, R1, R8);
    a.alu64_imm(AND, R1, 1);
    a.jump_imm(JEQ, R1, 0, "next");
    entry_of_level(&mut a, maps.grants, "refuse", "next");
    a.jump_reg(JNE, R1, R2, "next");
    // Granted to this level: good for the cgroup itself, and below it where its mark vouches for the refusal.
    a.mov(R1, R9);
    a.alu64(RSH, R1, R8);
    a.alu64_imm(AND, R1, 1);
    a.jump_imm(JNE, R1, 0, "allow");
    a.call(helper::GET_CURRENT_CGROUP_ID);
    a.load(DW, R1, R10, KEY);
    a.jump_reg(JEQ, R0, R1, "allow");
    a.label("next");
    a.alu64_imm(ADD, R8, 1);
    a.jump("level");

    a.label("allow");
    a.mov_imm(R1, 0);
    a.call(helper::SET_RETVAL);
    a.label("leave");
    a.mov_imm(R0, 1);
    a.exit();

    a.label("refuse");
    a.mov_imm(R1, EPERM);
    a.call(helper::SET_RETVAL);
    report(&mut a, maps.watched, maps.refused);

    if let Some(withdrawn_fd) = maps.withdrawn {
        a.label("allowed");
        question(&mut a);
        a.mov_imm(R8, 1);
        a.label("withdrawn level");
        a.jump32_imm(JGT, R8, MAX_LEVELS as i32 - 1, "leave");
        entry_of_level(&mut a, withdrawn_fd, "leave", "not withdrawn");
        // As if it had been refused: a grant lifts that too.
        a.mov_imm(R7, -1);
        a.jump_imm(JNE, R1, 0, "wanted");
        a.label("not withdrawn");
        a.alu64_imm(ADD, R8, 1);
        a.jump("withdrawn level");
    }
    a.finish()
}

/// `BPF_DEVCG_ACC_READ` and `BPF_DEVCG_ACC_WRITE`.
const OPENING: i32 = 6;

/// Where [`question`] leaves the key, without its cgroup, and the wanted access on the stack.
const KEY: i16 = -40;
const WANTED: i16 = -48;

/// Takes what is asked for from the context in R6 onto the stack.
fn question(a: &mut Assembler) {
    a.load(W, R1, R6, CTX_ACCESS_TYPE);
    a.mov32(R2, R1);
    a.alu32_imm(AND, R2, 0xffff);
    a.store(W, R10, KEY + 8, R2);
    a.alu32_imm(RSH, R1, 16);
    a.store(DW, R10, WANTED, R1);
    a.load(W, R1, R6, CTX_MAJOR);
    a.store(W, R10, KEY + 12, R1);
    a.load(W, R1, R6, CTX_MINOR);
    a.store(W, R10, KEY + 16, R1);
    a.store_imm(W, R10, KEY + 20, 0);
}

/// R1 = what of the wanted access (R2) the map holds for the ancestor of level R8. Jumps where there is no such ancestor,
/// and where the map has no entry.
fn entry_of_level(a: &mut Assembler, map_fd: i32, no_ancestor: &'static str, no_entry: &'static str) {
    a.mov(R1, R8);
    a.call(helper::GET_CURRENT_ANCESTOR_CGROUP_ID);
    a.jump_imm(JEQ, R0, 0, no_ancestor);
    a.store(DW, R10, KEY, R0);
    a.lookup(map_fd, KEY);
    a.jump_imm(JEQ, R0, 0, no_entry);
    a.load(W, R1, R0, 0);
    a.load(DW, R2, R10, WANTED);
    a.alu64(AND, R1, R2);
}

/// Reports the refusal of what [`question`] took, for the innermost ancestor that is watched, and leaves. A refusal from
/// below a mark (R7 says which it is) is no answer of the container's own filter, and to make a node opens nothing.
fn report(a: &mut Assembler, watched_fd: i32, refused_fd: i32) {
    a.jump32_imm(JNE, R7, -1, "leave");
    a.load(DW, R9, R10, WANTED);
    a.mov(R1, R9);
    a.alu64_imm(AND, R1, OPENING);
    a.jump_imm(JEQ, R1, 0, "leave");
    // Where there is no ancestor of that level, its id is 0, which nobody has: a branch for that would double what the
    // verifier walks.
    a.mov_imm(R8, MAX_LEVELS as i32 - 1);
    a.label("watched level");
    a.jump32_imm(JEQ, R8, 0, "leave");
    a.mov(R1, R8);
    a.call(helper::GET_CURRENT_ANCESTOR_CGROUP_ID);
    a.store(DW, R10, KEY, R0);
    a.lookup(watched_fd, KEY);
    a.jump_imm(JNE, R0, 0, "watched");
    a.alu64_imm(SUB, R8, 1);
    a.jump("watched level");

    // R1 = this window and the reports that were made in it.
    a.label("watched");
    a.mov(R6, R0);
    a.call(helper::KTIME_GET_NS);
    a.alu64_imm(RSH, R0, WINDOW_SHIFT);
    a.load(DW, R1, R6, 0);
    a.mov(R2, R1);
    a.alu64_imm(RSH, R2, 32);
    a.jump_reg(JEQ, R2, R0, "count");
    a.mov(R1, R0);
    a.alu64_imm(LSH, R1, 32);
    a.label("count");
    a.jump32_imm(JGT, R1, REPORTS_PER_WINDOW as i32 - 1, "leave");
    a.alu64_imm(ADD, R1, 1);
    a.store(DW, R6, 0, R1);
    // The report is the key, with the access in its last field.
    a.store(W, R10, KEY + 20, R9);
    a.map(R1, refused_fd);
    a.mov(R2, R10);
    a.alu64_imm(ADD, R2, i32::from(KEY));
    a.mov_imm(R3, KEY_SIZE as i32);
    a.mov_imm(R4, 0);
    // Where the ring is full, this one is lost.
    a.call(helper::RINGBUF_OUTPUT);
    a.jump("leave");
}

/// The program for first place on a granted container's cgroup at `level` (the root's children have level 1).
pub fn mark(level: u32, witness_fd: i32) -> Vec<Insn> {
    assert!(level < MAX_LEVELS, "a cgroup of level {level} cannot be marked");
    const INDEX: i16 = -4;
    let mut a = Assembler::default();
    a.store_imm(W, R10, INDEX, 0);
    a.lookup(witness_fd, INDEX);
    a.jump_imm(JEQ, R0, 0, "verdict");
    a.mov(R7, R0);
    a.call(helper::GET_CURRENT_PID_TGID);
    a.alu64_imm(LSH, R0, 32);
    a.load(DW, R1, R7, 0);
    a.mov(R2, R1);
    a.alu64_imm(RSH, R2, 32);
    a.alu64_imm(LSH, R2, 32);
    a.jump_reg(JEQ, R2, R0, "add");
    a.mov(R1, R0);
    a.label("add");
    a.mov32_imm(R2, 1 << level);
    a.alu64(OR, R1, R2);
    a.store(DW, R7, 0, R1);

    a.label("verdict");
    a.call(helper::GET_RETVAL);
    a.jump32_imm(JNE, R0, EPERM, "leave");
    a.mov_imm(R1, -(MARK_BASE + level as i32));
    a.call(helper::SET_RETVAL);
    a.label("leave");
    a.mov_imm(R0, 1);
    a.exit();
    a.finish()
}

/// What [`keep_apart`] makes of a refusal: an errno that no other program and no system call returns.
pub const KEPT_APART: i32 = 3000;

/// The program that runs right after a copy of a foreign one, to hear its verdict alone: of a refusal it makes an error
/// that the kernel keeps, whatever the programs further up say.
pub fn keep_apart() -> Vec<Insn> {
    let mut a = Assembler::default();
    a.call(helper::GET_RETVAL);
    a.jump32_imm(JNE, R0, EPERM, "leave");
    a.mov_imm(R1, -KEPT_APART);
    a.call(helper::SET_RETVAL);
    a.label("leave");
    a.mov_imm(R0, 1);
    a.exit();
    a.finish()
}

/// A program that lets everything pass: what an open costs under any device program is measured with it.
pub fn allow() -> Vec<Insn> {
    let mut a = Assembler::default();
    a.mov_imm(R0, 1);
    a.exit();
    a.finish()
}

/// The name of this binary's [`lift`] in one of its two forms: layout version and a fingerprint of the instructions, 15
/// characters.
pub fn lift_name(withdraws: bool) -> String {
    format!(
        "{LIFT_PREFIX}{LAYOUT}_{:04x}",
        fingerprint(&lift(Maps { withdrawn: withdraws.then_some(0), ..Maps::default() }))
    )
}

/// The name of this binary's [`mark`]s.
pub fn mark_name() -> String {
    format!("{MARK_PREFIX}{LAYOUT}_{:04x}", fingerprint(&mark(1, 0)))
}

/// FNV-1a, folded to 16 bits: enough to tell one build's program from the next one's.
fn fingerprint(program: &[Insn]) -> u16 {
    let hash = assemble(program)
        .iter()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    (hash ^ (hash >> 16)) as u16
}

#[cfg(test)]
#[path = "filter_program_tests.rs"]
mod tests;
