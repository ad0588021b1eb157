//! Which refusals [`lift`] reports.

use super::*;
use crate::core::device::{Access, Kind, Number};
use crate::core::refusal::Refusal;

/// A kernel in which the cgroups of these levels are watched.
fn watching(retval: i32, depth: usize, levels: &[usize]) -> Kernel {
    let watched = levels.iter().map(|level| (cgroup_id(*level), Box::default())).collect();
    Kernel { retval, depth, watched, ..Kernel::default() }
}

fn set(kernel: Kernel) {
    KERNEL.with_borrow_mut(|k| *k = kernel);
}

/// What was reported since the last time.
fn reports() -> Vec<Refusal> {
    let reports = KERNEL.with_borrow_mut(|k| std::mem::take(&mut k.reports));
    reports.iter().map(|report| Refusal::parse(report).unwrap()).collect()
}

#[test]
fn a_refusal_is_reported_for_the_innermost_watched_ancestor() {
    let mut cases = 0;
    for maps in [MAPS, WITHDRAWING] {
        let program = lift(maps);
        for verdict in [0, -1, -13, -2000, -2001, -2031, 1] {
            for depth in [1, 2, 4, 31] {
                for levels in [&[][..], &[1], &[2], &[4], &[31], &[1, 2], &[2, 4]] {
                    for wanted in 1..8 {
                        for granted in [0, 6, 7] {
                            cases += 1;
                            let mut kernel = watching(verdict, depth, levels);
                            kernel.grants.insert(key(depth, 2, 81, 5), Box::new(granted));
                            set(kernel);
                            assert_eq!(run(&program, wanted << 16 | 2, 81, 5), 1);
                            let is_refused = verdict == -1 && granted & wanted != wanted;
                            let innermost = levels.iter().filter(|level| **level <= depth).max();
                            let expected = innermost.filter(|_| is_refused && wanted & 6 != 0).map(|level| Refusal {
                                cgroup: cgroup_id(*level),
                                number: Number { kind: Kind::Char, major: 81, minor: 5 },
                                access: Access::from_bits(wanted),
                            });
                            assert_eq!(
                                reports(),
                                Vec::from_iter(expected),
                                "verdict {verdict} depth {depth} watched {levels:?} wanted {wanted} granted {granted}"
                            );
                        }
                    }
                }
            }
        }
    }
    assert_eq!(cases, 2 * 7 * 4 * 7 * 7 * 3);
}

#[test]
fn what_is_withdrawn_is_reported_too() {
    let program = lift(WITHDRAWING);
    let mut kernel = watching(0, 3, &[2]);
    kernel.withdrawn.insert(key(2, 1, 7, 0), Box::new(6));
    set(kernel);
    run(&program, 2 << 16 | 1, 7, 0);
    KERNEL.with_borrow_mut(|k| k.retval = 0);
    run(&program, 2 << 16 | 1, 7, 1);
    let number = Number { kind: Kind::Block, major: 7, minor: 0 };
    assert_eq!(reports(), [Refusal { cgroup: cgroup_id(2), number, access: Access::READ }]);
}

#[test]
fn so_many_in_a_second_and_no_more() {
    let program = lift(MAPS);
    let window = 1 << WINDOW_SHIFT;
    set(watching(-1, 2, &[2]));
    for now in [0, window - 1, window, 5 * window + 7, 6 * window - 1, u64::from(u32::MAX) * window] {
        KERNEL.with_borrow_mut(|k| k.now = now);
        let before = *KERNEL.with_borrow(|k| k.watched[&cgroup_id(2)].clone());
        let room = if before >> 32 == now >> WINDOW_SHIFT { 16 - (before & 0xffff_ffff) } else { 16 };
        for _ in 0..40 {
            run(&program, 2 << 16 | 2, 81, 5);
        }
        assert_eq!(reports().len() as u64, room, "at {now}");
        KERNEL.with_borrow(|k| assert_eq!(*k.watched[&cgroup_id(2)], now >> WINDOW_SHIFT << 32 | 16));
    }
}

/// Whether anybody is watched makes no difference to what is let through: not one look-up more.
#[test]
fn an_open_that_is_let_through_executes_nothing_of_it() {
    for maps in [MAPS, WITHDRAWING] {
        let program = lift(maps);
        for (verdict, granted) in [(0, 0), (-1, 7), (-13, 0)] {
            let calls = [&[][..], &[1, 2]].map(|levels| {
                let mut kernel = watching(verdict, 2, levels);
                kernel.grants.insert(key(2, 2, 81, 5), Box::new(granted));
                set(kernel);
                run(&program, 6 << 16 | 2, 81, 5);
                assert_eq!(reports(), []);
                KERNEL.with_borrow(|k| k.calls.clone())
            });
            assert_eq!(calls[0], calls[1]);
            // The witness, and each level of both maps at most.
            let lookups = calls[0].iter().filter(|helper| **helper == 1).count();
            let expected =
                1 + if verdict == -1 { 2 } else { 0 } + if verdict == 0 && maps.withdrawn.is_some() { 2 } else { 0 };
            assert_eq!(lookups, expected, "verdict {verdict}");
        }
    }
}
