//! `/proc/PID/mountinfo` (proc_pid_mountinfo(5)), as far as the propagation of mounts goes (mount_namespaces(7)).

/// The peer group of the mount with this id: to the members of that group, and to their slaves, goes what is mounted on it.
/// `None` where it has none, or is not there.
pub fn peer_group(mountinfo: &str, id: u64) -> Option<u64> {
    let id = id.to_string();
    let line = mountinfo.lines().find(|line| line.split(' ').next() == Some(&id))?;
    tags(line).find_map(|tag| tag.strip_prefix("shared:")?.parse().ok())
}

/// Where a mount gets what is mounted on a member of that peer group, if one does.
pub fn receiver(mountinfo: &str, group: u64) -> Option<&str> {
    let (peer, slave) = (format!("shared:{group}"), format!("master:{group}"));
    let line = mountinfo.lines().find(|line| tags(line).any(|tag| tag == peer || tag == slave))?;
    line.split(' ').nth(4)
}

/// The optional fields: those after the sixth, up to a hyphen.
fn tags(line: &str) -> impl Iterator<Item = &str> {
    line.split(' ').skip(6).take_while(|field| *field != "-")
}

#[cfg(test)]
mod tests {
    use super::{peer_group, receiver};

    const TEXT: &str = "\
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
41 35 0:52 / /dev rw,nosuid shared:7 master:2 propagate_from:2 - tmpfs tmpfs rw
42 35 0:53 / /dev/shm rw - tmpfs shared:9 rw
43 35 0:54 / /a\\040b rw shared:77 - tmpfs tmpfs rw
";

    #[test]
    fn groups_are_found_by_the_mounts_id() {
        let groups = [36, 41, 42, 43, 4, 35].map(|id| peer_group(TEXT, id));
        assert_eq!(groups, [None, Some(7), None, Some(77), None, None]);
    }

    #[test]
    fn peers_and_slaves_receive() {
        let receivers = [1, 2, 7, 9, 77].map(|group| receiver(TEXT, group));
        assert_eq!(receivers, [Some("/mnt2"), Some("/dev"), Some("/dev"), None, Some("/a\\040b")]);
    }

    #[test]
    fn what_is_no_mountinfo_has_none() {
        for text in ["", "\n\n", "41", "41 shared:7", "-", "41 35 0:52 / /dev rw -"] {
            assert_eq!((peer_group(text, 41), receiver(text, 7)), (None, None), "{text:?}");
        }
    }
}
