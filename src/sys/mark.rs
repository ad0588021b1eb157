//! The mark on a granted container's cgroup, always in first place.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::core::filter_program as program;
use crate::failpoint::reached;
use crate::sys::bpf::{Map, Program, attached, attached_as};
use crate::sys::cgroup::Cgroup;

/// What the names of our copies begin with; the original's name follows, as far as it fits.
const COPY_PREFIX: &str = "qmhc_";

/// Whether the first program on the cgroup is this build's mark, and leaves its witness in this map.
pub(super) fn is_first(cgroup: &Cgroup, witness: &Map) -> io::Result<bool> {
    let Some(first) = attached(cgroup.as_fd())?.into_iter().next() else { return Ok(false) };
    let info = first.info()?;
    Ok(info.name == program::mark_name() && info.map_ids.contains(&witness.id()?))
}

/// Puts our mark into first place on the cgroup, without a moment in which the programs there do not decide, and
/// without one in which the mark runs after a program that refuses: it would take that refusal for one from below.
/// Copies of the programs are attached, the first original is replaced by the mark, and the originals come back, so
/// that the runtime that attached them can still replace them. A mark of another version is replaced in its place.
pub(super) fn put_first(cgroup: &Cgroup, witness: &Map) -> io::Result<()> {
    tidy(cgroup)?;
    if is_first(cgroup, witness)? {
        return Ok(());
    }
    let mark = Program::load(&program::mark_name(), &program::mark(cgroup.level, witness.as_raw_fd()))?;
    let (mut originals, mut marks) = (Vec::new(), Vec::new());
    for (at, program) in attached(cgroup.as_fd())?.into_iter().enumerate() {
        if !program.info()?.name.starts_with(program::MARK_PREFIX) {
            originals.push(program);
        } else if at == 0 {
            mark.replace(cgroup.as_fd(), &program)?;
        } else {
            marks.push(program);
        }
    }
    for stale in marks {
        stale.detach(cgroup.as_fd())?;
    }
    if is_first(cgroup, witness)? {
        return Ok(());
    }
    let Some(first) = originals.first() else {
        return mark.attach(cgroup.as_fd()).inspect(|()| reached("mark: attached"));
    };
    let copies = originals.iter().map(copy).collect::<io::Result<Vec<_>>>()?;
    let mut done = Vec::new();
    let result = step_aside(cgroup.as_fd(), &mark, &originals, &copies, &mut done);
    if result.is_err() {
        for undo in done.iter().rev() {
            // Best effort: the copies stay attached until their originals are back, so nothing is opened.
            let _ = match undo {
                Done::Attached(program) => program.detach(cgroup.as_fd()),
                Done::Replaced => first.replace(cgroup.as_fd(), &mark),
                Done::Detached(program) => program.attach(cgroup.as_fd()),
            };
        }
    }
    result
}

/// Removes all versions of our mark.
pub(super) fn remove(cgroup: &Cgroup) -> io::Result<()> {
    tidy(cgroup)?;
    for (mark, _) in attached_as(cgroup.as_fd(), program::MARK_PREFIX)? {
        mark.detach(cgroup.as_fd())?;
        reached("mark: removed");
    }
    Ok(())
}

/// A second program with the same instructions.
fn copy(original: &Program) -> io::Result<Program> {
    Program::load_bytes(&format!("{COPY_PREFIX}{}", original.info()?.name), &original.instructions()?)
}

/// After a [`put_first`] that was killed: copies whose originals are attached go. One whose original is not is all that is
/// left of it, and stays, under the original's name; then all follow each other as they did.
fn tidy(cgroup: &Cgroup) -> io::Result<()> {
    let cgroup = cgroup.as_fd();
    let copies = attached_as(cgroup, COPY_PREFIX)?;
    if copies.is_empty() {
        return Ok(());
    }
    let mut originals = Vec::new();
    for program in attached(cgroup)? {
        // What has maps was not copied.
        if !program.info()?.name.starts_with(COPY_PREFIX)
            && let Ok(instructions) = program.instructions()
        {
            originals.push((instructions, program));
        }
    }
    let mut all = Vec::new();
    for (copy, name) in &copies {
        let instructions = copy.instructions()?;
        let original = originals.iter().position(|(its, _)| *its == instructions).map(|at| originals.remove(at).1);
        all.push((copy, name.strip_prefix(COPY_PREFIX).unwrap_or_default(), instructions, original));
    }
    let is_whole = all.iter().all(|(.., original)| original.is_some());
    for (copy, name, instructions, original) in all {
        match original {
            Some(_) if is_whole => {}
            Some(original) => {
                original.detach(cgroup)?;
                original.attach(cgroup)?;
            }
            None => Program::load_bytes(name, &instructions)?.attach(cgroup)?,
        }
        copy.detach(cgroup)?;
    }
    Ok(())
}

enum Done<'a> {
    Attached(&'a Program),
    /// The mark has taken the place of the first original.
    Replaced,
    Detached(&'a Program),
}

fn step_aside<'a>(
    cgroup: BorrowedFd<'_>,
    mark: &Program,
    originals: &'a [Program],
    copies: &'a [Program],
    done: &mut Vec<Done<'a>>,
) -> io::Result<()> {
    let attach = |program: &'a Program, point, done: &mut Vec<Done<'a>>| -> io::Result<()> {
        program.attach(cgroup)?;
        reached(point);
        done.push(Done::Attached(program));
        Ok(())
    };
    let detach = |program: &'a Program, point, done: &mut Vec<Done<'a>>| -> io::Result<()> {
        program.detach(cgroup)?;
        reached(point);
        done.push(Done::Detached(program));
        Ok(())
    };
    for copy in copies {
        attach(copy, "mark: a copy is attached", done)?;
    }
    let (first, others) = originals.split_first().expect("there is one");
    mark.replace(cgroup, first)?;
    reached("mark: in the first one's place");
    done.push(Done::Replaced);
    for original in others {
        detach(original, "mark: an original is detached", done)?;
    }
    for original in originals {
        attach(original, "mark: an original is attached", done)?;
    }
    for copy in copies {
        detach(copy, "mark: a copy is detached", done)?;
    }
    Ok(())
}
