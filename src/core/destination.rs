//! Where a node may be made in a container: the pure part of the check.

/// Trees that the kernel fills: a node made there fails, or means something else than a device.
const KERNEL_TREES: [&str; 2] = ["/proc", "/sys"];

/// Checks a destination path and returns it with repeated slashes removed. Errors are in words that follow the path.
pub fn check(path: &str) -> Result<String, &'static str> {
    if !path.starts_with('/') {
        return Err("is relative: give an absolute path such as /dev/zigbee");
    }
    if path.ends_with('/') {
        return Err("is a directory: give the node's whole path");
    }
    if path.contains('\0') || path.len() > 4000 {
        return Err("is no usable path");
    }
    if path.chars().any(char::is_control) {
        return Err("has control characters: give a printable path");
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    if parts.iter().any(|part| matches!(*part, "." | "..")) {
        return Err("must not contain '.' or '..'");
    }
    let path = format!("/{}", parts.join("/"));
    if KERNEL_TREES
        .iter()
        .any(|tree| path.strip_prefix(tree).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
    {
        return Err("is below /proc or /sys, where no device node can be: give a path below /dev");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::check;
    use proptest::prelude::*;

    #[test]
    fn what_is_allowed_and_what_is_not() {
        assert_eq!(check("/dev//snd/x").as_deref(), Ok("/dev/snd/x"));
        assert_eq!(check("/procedure").as_deref(), Ok("/procedure"));
        for bad in [
            "",
            "dev/x",
            "/",
            "/dev/",
            "/dev/../etc/x",
            "/dev/./x",
            "/proc/x",
            "//proc/x",
            "/sys/x",
            "/proc",
            "/a\0b",
            "/dev/a\nb",
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_passes_is_absolute_and_climbs_nowhere(path in "[/.a-z]{0,20}") {
            if let Ok(path) = check(&path) {
                prop_assert!(path.starts_with('/') && !path.contains("//"));
                prop_assert!(!path.split('/').any(|part| part == ".." || part == "."));
                prop_assert_eq!(check(&path).unwrap(), path);
            }
        }
    }
}
