//! What a probe saw from inside a container, and what that means for who wants to open the device there.

use crate::core::device::{Access, Number};

/// What lies at a path inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Missing,
    /// The way there is not passable; why, in words.
    Blocked(String),
    /// Something that is no device node: `a FIFO`.
    Other(&'static str),
    /// A device node.
    Node(Seen),
}

/// A device node inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its device.
    pub number: Number,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Whether its mount lets no device be opened.
    pub nodev: bool,
}

/// What the kernel answered. Each errno is 0 where it agreed, and `None` where it was not asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What is at the path.
    pub found: Found,
    /// To root with all its capabilities, so that nothing but the device filter is in the way.
    pub filter: Option<i32>,
    /// To the user that the container's init is.
    pub user: Option<i32>,
    /// Whether `user` is about the node's directory, which that user cannot reach.
    pub directory: bool,
    /// When it was really opened.
    pub open: Option<i32>,
}

impl Answer {
    /// Nothing seen and nothing asked.
    pub fn none(found: Found) -> Answer {
        Answer { found, filter: None, user: None, directory: false, open: None }
    }
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Path of the node inside.
    pub path: String,
    /// The device that is to be there.
    pub number: Number,
    /// To read, to write or both.
    pub access: Access,
    /// Who init is: `uid 1000`.
    pub user: String,
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// What open(2) would answer; 0 where it would succeed, `None` where it would open something else.
    pub errno: Option<i32>,
    /// Why not, in words; `None` where it is accessible.
    pub reason: Option<String>,
    /// The exit code that goes with it.
    pub code: u8,
}

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const ENXIO: i32 = 6;
const EACCES: i32 = 13;
const ENODEV: i32 = 19;
const REFUSED: u8 = 5;
const NO_DEVICE: u8 = 4;

/// What the answer proves. Rights come first: where the filter refuses too, a missing node is the smaller trouble.
pub fn judge(subject: &Subject, answer: &Answer) -> Proof {
    let Subject { path, number, access, user } = subject;
    let not = |errno: Option<i32>, code: u8, reason: String| Proof { errno, reason: Some(reason), code };
    let refused = answer.filter == Some(EPERM);
    let trouble = match &answer.found {
        Found::Missing => Some((Some(ENOENT), format!("{path} is missing inside"))),
        Found::Blocked(reason) => Some((None, reason.clone())),
        Found::Other(what) => Some((None, format!("{path} is {what} inside"))),
        Found::Node(seen) if seen.number != *number => {
            Some((None, format!("{path} is the node of {} inside, not of {number}", seen.number)))
        }
        Found::Node(_) => None,
    };
    match (trouble, refused) {
        (Some((_, trouble)), true) => {
            return not(Some(EPERM), REFUSED, format!("the device filter refuses {access} on {number}, and {trouble}"));
        }
        (Some((errno, trouble)), false) => return not(errno, NO_DEVICE, trouble),
        (None, true) => return not(Some(EPERM), REFUSED, format!("the device filter refuses {access} on {number}")),
        (None, false) => {}
    }
    if let Some(errno) = answer.filter.filter(|errno| *errno != 0) {
        return not(Some(errno), code_of(errno), format!("{} even for root", errno_name(errno)));
    }
    if let Found::Node(seen) = &answer.found {
        if seen.nodev {
            return not(Some(EACCES), REFUSED, format!("{path} is on a mount that is nodev inside"));
        }
        if let Some(errno) = answer.user.filter(|errno| *errno != 0) {
            return not(Some(errno), code_of(errno), user_may_not(user, seen, answer.directory, errno));
        }
    }
    match answer.open {
        Some(errno @ (ENXIO | ENODEV)) => {
            not(Some(errno), NO_DEVICE, format!("no driver answers for {number}: it is unplugged"))
        }
        Some(errno) if errno != 0 => {
            not(Some(errno), code_of(errno), format!("its driver answers {}", errno_name(errno)))
        }
        _ => Proof { errno: Some(0), reason: None, code: 0 },
    }
}

/// Why a user may not, where the filter has nothing against it.
pub fn user_may_not(user: &str, seen: &Seen, directory: bool, errno: i32) -> String {
    match (directory, errno) {
        (true, _) => format!("{user} of its init cannot reach the node's directory"),
        (false, EACCES) => {
            format!("{user} of its init may not: the node is {:04o} {}:{}", seen.mode, seen.uid, seen.gid)
        }
        (false, errno) => format!("{user} of its init gets {}", errno_name(errno)),
    }
}

fn code_of(errno: i32) -> u8 {
    if matches!(errno, EPERM | EACCES) { REFUSED } else { 1 }
}

/// `EPERM`, or `errno 117` for those that open(2) does not return.
pub fn errno_name(errno: i32) -> String {
    const NAMES: [(i32, &str); 17] = [
        (0, "OK"),
        (EPERM, "EPERM"),
        (ENOENT, "ENOENT"),
        (4, "EINTR"),
        (5, "EIO"),
        (ENXIO, "ENXIO"),
        (11, "EAGAIN"),
        (12, "ENOMEM"),
        (EACCES, "EACCES"),
        (16, "EBUSY"),
        (ENODEV, "ENODEV"),
        (20, "ENOTDIR"),
        (22, "EINVAL"),
        (23, "ENFILE"),
        (24, "EMFILE"),
        (30, "EROFS"),
        (40, "ELOOP"),
    ];
    let name = NAMES.iter().find(|(number, _)| *number == errno);
    name.map_or_else(|| format!("errno {errno}"), |(_, name)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::device::Kind;

    const STICK: Number = Number { kind: Kind::Char, major: 188, minor: 0 };

    fn seen(nodev: bool, minor: u32) -> Found {
        Found::Node(Seen { number: Number { minor, ..STICK }, mode: 0o660, uid: 0, gid: 20, nodev })
    }

    #[test]
    fn each_answer_has_its_errno_its_words_and_its_exit_code() {
        let subject = Subject {
            path: "/dev/ttyUSB0".into(),
            number: STICK,
            access: Access::READ.union(Access::WRITE),
            user: "uid 1000".into(),
        };
        let node = || seen(false, 0);
        let table = [
            (node(), Some(0), Some(0), false, None, Some(0), 0, ""),
            (node(), Some(0), Some(0), false, Some(0), Some(0), 0, ""),
            (node(), Some(1), Some(1), false, None, Some(1), 5, "the device filter refuses rw on c 188:0"),
            (node(), Some(1), Some(13), false, None, Some(1), 5, "the device filter refuses rw on c 188:0"),
            (node(), Some(13), None, false, None, Some(13), 5, "EACCES even for root"),
            (
                node(),
                Some(0),
                Some(13),
                false,
                None,
                Some(13),
                5,
                "uid 1000 of its init may not: the node is 0660 0:20",
            ),
            (
                node(),
                Some(0),
                Some(13),
                true,
                None,
                Some(13),
                5,
                "uid 1000 of its init cannot reach the node's directory",
            ),
            (node(), Some(0), Some(0), false, Some(6), Some(6), 4, "no driver answers for c 188:0: it is unplugged"),
            (node(), Some(0), Some(0), false, Some(16), Some(16), 1, "its driver answers EBUSY"),
            (node(), Some(0), Some(0), false, Some(1), Some(1), 5, "its driver answers EPERM"),
            (
                seen(true, 0),
                Some(0),
                Some(0),
                false,
                None,
                Some(13),
                5,
                "/dev/ttyUSB0 is on a mount that is nodev inside",
            ),
            (seen(true, 0), Some(1), Some(1), false, None, Some(1), 5, "the device filter refuses rw on c 188:0"),
            (
                seen(false, 7),
                Some(0),
                None,
                false,
                None,
                None,
                4,
                "/dev/ttyUSB0 is the node of c 188:7 inside, not of c 188:0",
            ),
            (Found::Missing, Some(0), None, false, None, Some(2), 4, "/dev/ttyUSB0 is missing inside"),
            (Found::Missing, None, None, false, None, Some(2), 4, "/dev/ttyUSB0 is missing inside"),
            (
                Found::Missing,
                Some(1),
                None,
                false,
                None,
                Some(1),
                5,
                "the device filter refuses rw on c 188:0, and /dev/ttyUSB0 is missing inside",
            ),
            (Found::Other("a FIFO"), Some(0), None, false, None, None, 4, "/dev/ttyUSB0 is a FIFO inside"),
            (Found::Blocked("/dev is a link".into()), None, None, false, None, None, 4, "/dev is a link"),
        ];
        for (found, filter, user, directory, open, errno, code, reason) in table {
            let answer = Answer { found, filter, user, directory, open };
            let reason = Some(reason.to_owned()).filter(|reason| !reason.is_empty());
            assert_eq!(judge(&subject, &answer), Proof { errno, reason, code }, "{answer:?}");
        }
    }

    #[test]
    fn an_unknown_errno_has_its_number() {
        assert_eq!((errno_name(1), errno_name(117)), ("EPERM".into(), "errno 117".into()));
    }
}
