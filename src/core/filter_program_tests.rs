//! Both programs, interpreted over a full table of verdict × kind × numbers × access × cgroup level × witness.

use std::cell::RefCell;
use std::collections::HashMap;

use rbpf::EbpfVmRaw;

use super::*;

const GRANTS_FD: i32 = 11;
const WITNESS_FD: i32 = 12;
const WITHDRAWN_FD: i32 = 13;
const WATCHED_FD: i32 = 14;
const REFUSED_FD: i32 = 15;
const MAPS: Maps =
    Maps { grants: GRANTS_FD, witness: WITNESS_FD, withdrawn: None, watched: WATCHED_FD, refused: REFUSED_FD };
const WITHDRAWING: Maps = Maps { withdrawn: Some(WITHDRAWN_FD), ..MAPS };
const TASK: u64 = 0x0000_1234_0000_5678;
/// A witness of this task: its id above, levels below.
fn witness(task: u64, levels: u64) -> Box<u64> {
    Box::new(task << 32 | levels & 0xffff_ffff)
}

/// Ids of the cgroups from the root (level 0) to the task's.
fn cgroup_id(level: usize) -> u64 {
    if level == 0 { 1 } else { 0x0001_0000_0000_1000 + level as u64 }
}

/// What the helpers of the interpreted program see and change.
#[derive(Default)]
struct Kernel {
    retval: i32,
    depth: usize,
    grants: HashMap<[u8; KEY_SIZE], Box<u32>>,
    withdrawn: HashMap<[u8; KEY_SIZE], Box<u32>>,
    witness: Box<u64>,
    watched: HashMap<u64, Box<u64>>,
    now: u64,
    reports: Vec<[u8; KEY_SIZE]>,
    /// Helpers called.
    calls: Vec<i32>,
}

thread_local! { static KERNEL: RefCell<Kernel> = RefCell::default(); }

#[allow(unsafe_code)]
fn map_lookup(map: u64, key: u64, _: u64, _: u64, _: u64) -> u64 {
    called(1);
    KERNEL.with_borrow(|kernel| match map as i32 {
        WATCHED_FD => {
            // SAFETY: the program passes an address on the interpreter's stack with a cgroup id behind it.
            let cgroup = unsafe { *(key as *const u64) };
            kernel.watched.get(&cgroup).map_or(0, |value| &raw const **value as u64)
        }
        WITNESS_FD => &raw const *kernel.witness as u64,
        GRANTS_FD | WITHDRAWN_FD => {
            // SAFETY: the program passes an address on the interpreter's stack with KEY_SIZE bytes behind it.
            let key = unsafe { *(key as *const [u8; KEY_SIZE]) };
            let values = if map as i32 == GRANTS_FD { &kernel.grants } else { &kernel.withdrawn };
            values.get(&key).map_or(0, |value| &raw const **value as u64)
        }
        other => panic!("look-up in map {other}"),
    })
}

#[allow(unsafe_code)]
fn ring_output(map: u64, report: u64, size: u64, flags: u64, _: u64) -> u64 {
    called(130);
    assert_eq!((map as i32, size as usize, flags), (REFUSED_FD, KEY_SIZE, 0));
    // SAFETY: the program passes an address on the interpreter's stack with KEY_SIZE bytes behind it.
    let report = unsafe { *(report as *const [u8; KEY_SIZE]) };
    KERNEL.with_borrow_mut(|kernel| kernel.reports.push(report));
    0
}

fn called(helper: i32) {
    KERNEL.with_borrow_mut(|kernel| kernel.calls.push(helper));
}

fn run(program: &[Insn], access_type: u32, major: u32, minor: u32) -> u64 {
    let bytes = assemble(program);
    let mut vm = EbpfVmRaw::new(None).unwrap();
    vm.register_helper(1, map_lookup).unwrap();
    vm.register_helper(5, |_, _, _, _, _| KERNEL.with_borrow(|k| k.now)).unwrap();
    vm.register_helper(14, |_, _, _, _, _| TASK).unwrap();
    vm.register_helper(80, |_, _, _, _, _| KERNEL.with_borrow(|k| cgroup_id(k.depth))).unwrap();
    vm.register_helper(130, ring_output).unwrap();
    vm.register_helper(123, |level, _, _, _, _| {
        called(123);
        KERNEL.with_borrow(|k| if level as usize <= k.depth { cgroup_id(level as usize) } else { 0 })
    })
    .unwrap();
    vm.register_helper(186, |_, _, _, _, _| KERNEL.with_borrow(|k| i64::from(k.retval) as u64)).unwrap();
    vm.register_helper(187, |value, _, _, _, _| {
        KERNEL.with_borrow_mut(|k| k.retval = value as i32);
        0
    })
    .unwrap();
    KERNEL.with_borrow(|kernel| {
        let witness = &raw const *kernel.witness as u64;
        vm.register_allowed_memory(witness..witness + 8);
        for value in kernel.grants.values().chain(kernel.withdrawn.values()) {
            let address = &raw const **value as u64;
            vm.register_allowed_memory(address..address + 4);
        }
        for value in kernel.watched.values() {
            let address = &raw const **value as u64;
            vm.register_allowed_memory(address..address + 8);
        }
    });
    vm.set_program(&bytes).unwrap();
    let mut context: Vec<u8> = [access_type, major, minor].iter().flat_map(|field| field.to_le_bytes()).collect();
    vm.execute_program(&mut context).unwrap()
}

fn key(level: usize, kind: u32, major: u32, minor: u32) -> [u8; KEY_SIZE] {
    let mut key = [0; KEY_SIZE];
    key[..8].copy_from_slice(&cgroup_id(level).to_le_bytes());
    for (field, value) in [(8, kind), (12, major), (16, minor)] {
        key[field..field + 4].copy_from_slice(&value.to_le_bytes());
    }
    key
}

/// What [`lift`] should make of a verdict, said in another way than the program says it.
#[allow(clippy::too_many_arguments)]
fn expected(
    verdict: i32,
    depth: usize,
    granted_level: usize,
    granted: u32,
    wanted: u32,
    same_device: bool,
    witness: u64,
) -> i32 {
    let first = match verdict {
        -1 => 1,
        marked if (-2031..=-2000).contains(&marked) => (-2000 - marked) as usize + 1,
        other => return other,
    };
    let vouched = witness >> granted_level & 1 == 1 || granted_level == depth;
    let reached = granted_level >= first && granted_level <= depth;
    if same_device && reached && vouched && granted & wanted == wanted { 0 } else { -1 }
}

#[test]
fn lift_decides_the_whole_table_as_specified() {
    let program = lift(MAPS);
    let verdicts = [0, -1, -13, -2000, -2001, -2002, -2003, -2031, -2032, -1999, 1];
    let mut cases = 0;
    for verdict in verdicts {
        for depth in [1, 2, 4, 31] {
            for granted_level in [1, 2, 3, 4, 31] {
                for witness in [0, 1 << 1, 1 << 2, 1 << 2 | 1 << 3, 1 << 31, u64::MAX] {
                    for granted in 1..8 {
                        for wanted in 1..8 {
                            cases += 1;
                            KERNEL.with_borrow_mut(|k| {
                                *k = Kernel {
                                    retval: verdict,
                                    depth,
                                    witness: self::witness(TASK, witness),
                                    ..Kernel::default()
                                };
                                k.grants.insert(key(granted_level, 2, 188, 0), Box::new(granted));
                            });
                            assert_eq!(run(&program, wanted << 16 | 2, 188, 0), 1, "it never denies");
                            KERNEL.with_borrow(|k| {
                                let want = expected(verdict, depth, granted_level, granted, wanted, true, witness);
                                assert_eq!(
                                    k.retval, want,
                                    "verdict {verdict} depth {depth} grant {granted_level}:{granted} wanted {wanted} witness {witness:x}"
                                );
                                assert_eq!(*k.witness, 0, "the witness is spent");
                            });
                        }
                    }
                }
            }
        }
    }
    assert_eq!(cases, 11 * 4 * 5 * 6 * 7 * 7);
}

#[test]
fn what_is_withdrawn_is_refused_unless_it_is_granted() {
    let (plain, withdrawing) = (lift(MAPS), lift(WITHDRAWING));
    let mut cases = 0;
    let verdicts = [0, -1, -13, -2002, 1];
    let levels = [1, 2, 4, 31];
    for (verdict, depth) in verdicts.into_iter().flat_map(|verdict| levels.map(|depth| (verdict, depth))) {
        for (withdrawn_level, granted_level) in levels.into_iter().flat_map(|a| levels.map(|b| (a, b))) {
            for withdrawn in 0..8 {
                for (granted, minor) in [(0, 0), (6, 0), (7, 0), (7, 1)] {
                    for wanted in 1..8 {
                        cases += 1;
                        let set = || {
                            KERNEL.with_borrow_mut(|k| {
                                *k = Kernel { retval: verdict, depth, ..Kernel::default() };
                                k.withdrawn.insert(key(withdrawn_level, 2, 188, 0), Box::new(withdrawn));
                                k.grants.insert(key(granted_level, 2, 188, minor), Box::new(granted));
                            });
                        };
                        set();
                        assert_eq!(run(&withdrawing, wanted << 16 | 2, 188, 0), 1);
                        let applies = verdict == 0 && withdrawn_level <= depth && withdrawn & wanted != 0;
                        // A withdrawal is as good as a refusal of the container's own.
                        let before = if applies { -1 } else { verdict };
                        let want = expected(before, depth, granted_level, granted, wanted, minor == 0, 0);
                        let got = KERNEL.with_borrow(|k| k.retval);
                        assert_eq!(
                            got, want,
                            "verdict {verdict} depth {depth} withdrawn {withdrawn_level}:{withdrawn} grant {granted_level}:{granted} wanted {wanted}"
                        );
                        if !applies {
                            set();
                            run(&plain, wanted << 16 | 2, 188, 0);
                            assert_eq!(got, KERNEL.with_borrow(|k| k.retval), "both forms agree");
                        }
                    }
                }
            }
        }
    }
    assert_eq!(cases, 5 * 4 * 16 * 8 * 4 * 7);
}

#[test]
fn a_withdrawal_tells_kinds_and_numbers_apart() {
    let program = lift(WITHDRAWING);
    let numbers = [0, 1, 188, 189, 0xf_ffff];
    for (kind, major) in (1..3).flat_map(|kind| numbers.map(|major| (kind, major))) {
        for minor in numbers {
            KERNEL.with_borrow_mut(|k| {
                *k = Kernel { depth: 1, ..Kernel::default() };
                k.withdrawn.insert(key(1, 2, 188, 1), Box::new(6));
            });
            run(&program, 6 << 16 | kind, major, minor);
            let refused = (kind, major, minor) == (2, 188, 1);
            KERNEL.with_borrow(|k| assert_eq!(k.retval, if refused { -1 } else { 0 }, "{kind} {major}:{minor}"));
        }
    }
}

#[test]
fn lift_tells_kinds_and_numbers_apart() {
    let program = lift(MAPS);
    let numbers = [0, 1, 187, 188, 189, 4095, 0xf_ffff];
    let table =
        (1..3).flat_map(|kind| numbers.map(|major| (kind, major))).flat_map(|(k, a)| numbers.map(|b| (k, a, b)));
    for (kind, major, minor) in table {
        for verdict in [0, -1, -2000] {
            KERNEL.with_borrow_mut(|k| {
                *k = Kernel { retval: verdict, depth: 1, ..Kernel::default() };
                k.grants.insert(key(1, 2, 188, 1), Box::new(7));
            });
            assert_eq!(run(&program, 6 << 16 | kind, major, minor), 1);
            let same = (kind, major, minor) == (2, 188, 1);
            KERNEL.with_borrow(|k| {
                assert_eq!(k.retval, expected(verdict, 1, 1, 7, 6, same, 0), "{kind} {major}:{minor}")
            });
        }
    }
}

#[test]
fn a_witness_of_another_task_counts_for_nothing() {
    let program = lift(MAPS);
    for (task, lifted) in [(TASK, true), (TASK + 1, false), (0, false)] {
        KERNEL.with_borrow_mut(|k| {
            *k = Kernel { retval: -1, depth: 3, witness: witness(task, 1 << 1), ..Kernel::default() };
            k.grants.insert(key(1, 2, 188, 0), Box::new(7));
        });
        run(&program, 2 << 16 | 2, 188, 0);
        KERNEL.with_borrow(|k| assert_eq!(k.retval, if lifted { 0 } else { -1 }));
    }
}

#[test]
fn mark_renames_a_refusal_and_nothing_else_and_leaves_its_witness() {
    for level in 1..MAX_LEVELS {
        let program = mark(level, WITNESS_FD);
        for (verdict, after) in [(0, 0), (-1, -(2000 + level as i32)), (-13, -13), (-2005, -2005), (7, 7)] {
            for (before, expected_levels) in
                [((0, u64::MAX), 1 << level), ((TASK, 1 << 5), 1 << level | 1 << 5), ((TASK + 1, 1 << 5), 1 << level)]
            {
                KERNEL.with_borrow_mut(|k| {
                    *k = Kernel { retval: verdict, witness: witness(before.0, before.1), ..Kernel::default() };
                });
                assert_eq!(run(&program, 2 << 16 | 2, 1, 1), 1);
                KERNEL.with_borrow(|k| {
                    assert_eq!(k.retval, after, "level {level} verdict {verdict}");
                    assert_eq!(k.witness, witness(TASK, expected_levels));
                });
            }
        }
    }
}

/// One verdict through all programs of a path, as `bpf_prog_run_array_cg` runs them: the leaf's first.
fn walk(depth: usize, filters: &[(usize, bool)], marks: &[usize], grants: &[usize]) -> i32 {
    KERNEL.with_borrow_mut(|k| {
        *k = Kernel { depth, ..Kernel::default() };
        for level in grants {
            k.grants.insert(key(*level, 2, 188, 0), Box::new(7));
        }
    });
    for level in (1..=depth).rev() {
        if marks.contains(&level) {
            run(&mark(level as u32, WITNESS_FD), 2 << 16 | 2, 188, 0);
        }
        for (_, allows) in filters.iter().filter(|(at, _)| *at == level) {
            KERNEL.with_borrow_mut(|k| {
                if !allows && !(-4095..0).contains(&k.retval) {
                    k.retval = -1;
                }
            });
        }
    }
    run(&lift(MAPS), 2 << 16 | 2, 188, 0);
    KERNEL.with_borrow(|k| k.retval)
}

#[test]
fn a_container_and_what_is_nested_in_it() {
    let (deny, allow) = (false, true);
    // The container at level 2 has the runtime's denying filter, a mark and a grant.
    assert_eq!(walk(2, &[(2, deny)], &[2], &[2]), 0, "the container itself");
    assert_eq!(walk(4, &[(2, deny)], &[2], &[2]), 0, "a child without a filter");
    assert_eq!(walk(4, &[(4, allow), (2, deny)], &[2], &[2]), 0, "a child that allows");
    assert_eq!(walk(4, &[(4, deny), (2, deny)], &[2], &[2]), -1, "a child that denies");
    assert_eq!(walk(5, &[(4, deny), (2, deny)], &[2], &[2]), -1, "below a child that denies");
    assert_eq!(walk(2, &[(2, deny), (1, deny)], &[2], &[2]), 0, "the slice denies too");
    // The nested container at level 4 is granted alone.
    assert_eq!(walk(4, &[(4, deny), (2, deny)], &[4], &[4]), 0, "nested alone");
    assert_eq!(walk(2, &[(2, deny)], &[], &[4]), -1, "the outer stays closed");
    assert_eq!(walk(4, &[(4, deny), (2, deny)], &[2, 4], &[4]), 0, "nested alone, outer marked for another device");
    assert_eq!(walk(6, &[(6, deny), (4, deny), (2, deny)], &[2, 4], &[2, 4]), -1, "below nested denies");
    // The runtime has detached the mark.
    assert_eq!(walk(2, &[(2, deny)], &[], &[2]), 0, "without the mark: the container itself");
    assert_eq!(walk(4, &[(4, deny), (2, deny)], &[], &[2]), -1, "without the mark: a child that denies stays closed");
    assert_eq!(walk(4, &[(2, deny)], &[], &[2]), -1, "without the mark: a child is not vouched for");
}

#[test]
fn names_fit_the_kernels_fifteen_characters() {
    for name in
        [lift_name(false), lift_name(true), mark_name(), GRANTS_MAP.into(), WITNESS_MAP.into(), WITHDRAWN_MAP.into()]
            .into_iter()
            .chain([WATCHED_MAP.into(), REFUSED_MAP.into()])
    {
        assert!(name.len() <= 15, "{name}");
    }
}

#[path = "filter_program_report_tests.rs"]
mod reports;
