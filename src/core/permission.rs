//! Whether a user may open a file: the kernel's own rule, by owner, mode and POSIX access control list (path_resolution(7),
//! acl(5); `acl_permission_check` in fs/namei.c, `posix_acl_permission` in fs/posix_acl.c).

/// Who asks, without any capability.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// All groups, the first one of the user's own among them.
    pub groups: Vec<u32>,
}

/// A file, as far as it decides who may open it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits. With a list, those of the group are its mask.
    pub mode: u32,
    /// The access control list, where there is one.
    pub acl: Option<Acl>,
}

/// Reading, writing, searching: the three bits of a class in a mode.
pub const READ: u32 = 4;
/// Writing.
pub const WRITE: u32 = 2;
/// Searching a directory.
pub const SEARCH: u32 = 1;

/// A POSIX access control list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    tag: Tag,
    bits: u32,
}

/// Whom an entry is for (`ACL_USER_OBJ` and the others of linux/posix_acl.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    Owner,
    User(u32),
    OwningGroup,
    Group(u32),
    Mask,
    Other,
}

impl Acl {
    /// Reads the value of the attribute `system.posix_acl_access`: a version and entries of tag, permissions and id, all
    /// of them little-endian (linux/posix_acl_xattr.h). `None` for what the kernel would not write.
    pub fn parse(bytes: &[u8]) -> Option<Acl> {
        const VERSION: [u8; 4] = 2u32.to_le_bytes();
        let entries = bytes.strip_prefix(&VERSION)?;
        let entry = |entry: &[u8]| {
            let [t0, t1, p0, p1, i0, i1, i2, i3] = *entry else { return None };
            let id = u32::from_le_bytes([i0, i1, i2, i3]);
            let tag = match u16::from_le_bytes([t0, t1]) {
                0x01 => Tag::Owner,
                0x02 => Tag::User(id),
                0x04 => Tag::OwningGroup,
                0x08 => Tag::Group(id),
                0x10 => Tag::Mask,
                0x20 => Tag::Other,
                _ => return None,
            };
            Some(Entry { tag, bits: u32::from(u16::from_le_bytes([p0, p1])) & 7 })
        };
        entries.chunks(8).map(entry).collect::<Option<Vec<_>>>().map(Acl)
    }

    /// What it says where it has an entry for the user or for one of his groups; else what it says of others.
    fn allows(&self, file: &File, user: &User, wanted: u32) -> bool {
        let bits_of = |tag: Tag| self.0.iter().find(|entry| entry.tag == tag).map(|entry| entry.bits);
        let mask = bits_of(Tag::Mask).unwrap_or(7);
        let has = |bits: u32| bits & wanted == wanted;
        if let Some(bits) = bits_of(Tag::User(user.uid)) {
            return has(bits & mask);
        }
        let is_in = |gid: u32| user.groups.contains(&gid);
        let mut of_groups = self.0.iter().filter(|entry| match entry.tag {
            Tag::OwningGroup => is_in(file.gid),
            Tag::Group(gid) => is_in(gid),
            _ => false,
        });
        // One of the groups must allow all of it: two do not add up.
        match of_groups.clone().next() {
            Some(_) => of_groups.any(|entry| has(entry.bits & mask)),
            None => bits_of(Tag::Other).is_some_and(has),
        }
    }
}

impl File {
    /// Whether the user may do all that is wanted at once, a union of [`READ`], [`WRITE`] and [`SEARCH`].
    pub fn allows(&self, user: &User, wanted: u32) -> bool {
        let class = |shift: u32| self.mode >> shift & wanted == wanted;
        if user.uid == self.uid {
            return class(6);
        }
        match &self.acl {
            // With an empty mask the kernel does not look at the list.
            Some(acl) if self.mode & 0o070 != 0 => acl.allows(self, user, wanted),
            _ if user.groups.contains(&self.gid) => class(3),
            _ => class(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, bits, id) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(bits.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    const NONE: u32 = u32::MAX;

    #[test]
    fn what_a_list_says() {
        let user = |uid, groups: &[u32]| User { uid, groups: groups.to_vec() };
        let list = acl(&[
            (1, 6, NONE),
            (2, 6, 1000),
            (2, 7, 1001),
            (4, 0, NONE),
            (8, 4, 50),
            (8, 2, 51),
            (0x10, 6, NONE),
            (0x20, 0, NONE),
        ]);
        let file = File { uid: 0, gid: 20, mode: 0o660, acl: Acl::parse(&list) };
        assert!(file.acl.is_some());
        assert!(file.allows(&user(1000, &[]), READ | WRITE));
        assert!(!file.allows(&user(1001, &[]), SEARCH), "the mask");
        assert!(file.allows(&user(7, &[50, 51]), READ) && file.allows(&user(7, &[50, 51]), WRITE));
        assert!(!file.allows(&user(7, &[50, 51]), READ | WRITE), "two groups do not add up");
        assert!(!file.allows(&user(7, &[20]), READ), "the mode's group bits are the mask");
        assert!(!file.allows(&user(7, &[]), READ));
        let open = File { mode: 0o604, ..file };
        assert!(open.allows(&user(1000, &[]), READ) && !open.allows(&user(1000, &[]), WRITE), "no mask, no list");
    }

    #[test]
    fn what_is_no_list() {
        for bytes in [&b""[..], b"\x02\0\0", b"\x01\0\0\0", &acl(&[(3, 0, 0)]), &acl(&[(1, 7, NONE)])[..11]] {
            assert_eq!(Acl::parse(bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_attribute_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64), uid: u32, mode in 0u32..0o1000) {
            let file = File { uid: 0, gid: 0, mode, acl: Acl::parse(&bytes) };
            file.allows(&User { uid, groups: vec![uid] }, READ);
        }

        /// Without a list it is the mode alone, and one class of it: the first that fits.
        #[test]
        fn one_class_decides(mode in 0u32..0o1000, wanted in 1u32..8, is_owner: bool, is_member: bool) {
            let file = File { uid: 5, gid: 6, mode, acl: None };
            let user = User { uid: if is_owner { 5 } else { 9 }, groups: if is_member { vec![1, 6] } else { vec![1] } };
            let class = if is_owner { mode >> 6 } else if is_member { mode >> 3 } else { mode } & 7;
            prop_assert_eq!(file.allows(&user, wanted), class & wanted == wanted);
        }

        /// More is never easier to be allowed than less.
        #[test]
        fn who_may_do_both_may_do_each(
            entries in proptest::collection::vec((prop::sample::select(vec![1u16, 2, 4, 8, 0x10, 0x20]), 0u16..8, 0u32..4), 0..9),
            mode in 0u32..0o1000,
            uid in 0u32..4,
            groups in proptest::collection::vec(0u32..4, 0..4),
        ) {
            let file = File { uid: 3, gid: 2, mode, acl: Acl::parse(&acl(&entries)) };
            let user = User { uid, groups };
            if file.allows(&user, READ | WRITE) {
                prop_assert!(file.allows(&user, READ) && file.allows(&user, WRITE));
            }
        }
    }
}
