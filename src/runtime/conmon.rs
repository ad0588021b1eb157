//! conmon, the parent of a podman container's init: its command line holds the container's name.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;

use crate::sys::process::Process;

/// Of a longer command line, the end is not read: conmon's has three KiB.
const LONGEST: u64 = 128 << 10;

/// The name that podman gave the container `id`. Its conmon is the parent of init; while the container is being
/// created the runtime's own processes are still between them.
pub fn name_of(init: &Process, id: &str) -> Option<String> {
    let parent_now = || Some(Process::open_same(init.pid, init.start_time)?.parent);
    // The process between them may have ended meanwhile: then there is one less.
    below(init.parent, id).or_else(|| below(parent_now()?, id))
}

fn below(parent: u32, id: &str) -> Option<String> {
    let mut ancestor = parent;
    for _ in 0..4 {
        let mut command_line = Vec::new();
        let file = File::open(format!("/proc/{ancestor}/cmdline")).ok()?;
        file.take(LONGEST).read_to_end(&mut command_line).ok()?;
        if let Some(name) = parse(&command_line, id) {
            return Some(name);
        }
        ancestor = procfs::process::Process::new(ancestor as i32).and_then(|process| process.stat()).ok()?.ppid as u32;
    }
    None
}

/// Reads `-n NAME` from a command line (NUL after each argument) that also has `-c ID`.
pub fn parse(command_line: &[u8], id: &str) -> Option<String> {
    let arguments: Vec<String> = command_line
        .split(|byte| *byte == 0)
        .map(|argument| std::ffi::OsString::from_vec(argument.to_vec()).to_string_lossy().into_owned())
        .collect();
    let after = |option: &str| {
        let at = arguments.iter().position(|argument| argument == option)?;
        arguments.get(at + 1)
    };
    let is_conmon = arguments.first()?.rsplit('/').next()?.starts_with("conmon");
    (is_conmon && after("-c")? == id).then(|| after("-n").cloned()).flatten()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn the_name_of_the_right_container_only() {
        let line =
            b"/usr/bin/conmon\0--api-version\x001\0-c\0abc\0-u\0abc\0-r\0/usr/bin/crun\0-n\0web\0--exit-dir\0/x\0";
        assert_eq!(parse(line, "abc").as_deref(), Some("web"));
        assert_eq!(parse(line, "abd"), None);
        assert_eq!(parse(b"/sbin/init\0-c\0abc\0-n\0web\0", "abc"), None);
        assert_eq!(parse(b"", "abc"), None);
    }
}
