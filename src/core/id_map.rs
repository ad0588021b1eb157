//! The ids of a user namespace, as `/proc/PID/uid_map` and `gid_map` tell them (user_namespaces(7)).

use std::ops::RangeInclusive;

/// Which ids inside are which ids on the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IdMap(Vec<Extent>);

/// Neighbouring ids that are mapped together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Extent {
    inside: u32,
    host: u32,
    /// One at least, and no id is past the last one that there is.
    count: u32,
}

impl IdMap {
    /// Reads a map as the host sees it. `None` where it is not of that format or maps nothing: a namespace that is being
    /// made has an empty one.
    pub fn parse(text: &str) -> Option<IdMap> {
        let extents: Option<Vec<_>> = text.lines().map(Extent::parse).collect();
        extents.filter(|extents| !extents.is_empty()).map(IdMap)
    }

    /// The id on the host of one inside. `None` where it is not mapped.
    pub fn to_host(&self, inside: u32) -> Option<u32> {
        self.0.iter().find_map(|it| translated(inside, it.inside, it.host, it.count))
    }

    /// The id inside of one on the host. `None` where it is not mapped: it is `nobody` there.
    pub fn to_inside(&self, host: u32) -> Option<u32> {
        self.0.iter().find_map(|it| translated(host, it.host, it.inside, it.count))
    }

    /// The id on the host of the container's root; where it has none, of the lowest id inside.
    pub fn root(&self) -> u32 {
        self.0.iter().min_by_key(|it| it.inside).expect("a map has an extent").host
    }

    /// The ranges of ids on the host.
    pub fn of_host(&self) -> impl Iterator<Item = RangeInclusive<u32>> {
        self.0.iter().map(|it| it.host..=it.host + (it.count - 1))
    }
}

impl Extent {
    fn parse(line: &str) -> Option<Extent> {
        let fields: Vec<u32> = line.split_whitespace().map(|field| field.parse().ok()).collect::<Option<_>>()?;
        let [inside, host, count] = fields[..] else { return None };
        let last = count.checked_sub(1)?;
        (inside.checked_add(last).is_some() && host.checked_add(last).is_some()).then_some(Extent {
            inside,
            host,
            count,
        })
    }
}

fn translated(id: u32, from: u32, to: u32, count: u32) -> Option<u32> {
    id.checked_sub(from).filter(|at| *at < count).map(|at| to + at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::IdMap;

    #[test]
    fn ids_are_translated_both_ways() {
        let map = IdMap::parse("         0     100000         10\n        20       5000          1\n").unwrap();
        let cases = [(0, Some(100_000)), (9, Some(100_009)), (10, None), (20, Some(5000)), (21, None)];
        for (inside, host) in cases {
            assert_eq!(map.to_host(inside), host, "{inside}");
            if let Some(host) = host {
                assert_eq!(map.to_inside(host), Some(inside));
            }
        }
        assert_eq!((map.root(), map.to_inside(0), map.to_inside(100_010)), (100_000, None, None));
        assert_eq!(map.of_host().collect::<Vec<_>>(), [100_000..=100_009, 5000..=5000]);
    }

    #[test]
    fn the_hosts_own_map_changes_nothing() {
        let map = IdMap::parse("0 0 4294967295").unwrap();
        assert_eq!(
            (map.to_host(0), map.to_host(4_294_967_294), map.to_host(4_294_967_295)),
            (Some(0), Some(4_294_967_294), None)
        );
    }

    #[test]
    fn the_lowest_id_stands_for_a_root_that_is_not_mapped() {
        assert_eq!(IdMap::parse("1000 70 1\n5 60 2").unwrap().root(), 60);
    }

    #[test]
    fn what_is_no_map_is_none() {
        let texts = ["", "\n", "0 1", "0 1 0", "0 1 2 3", "a 1 2", "0 -1 2", "4294967295 0 2", "0 4294967295 2"];
        for text in texts {
            assert_eq!(IdMap::parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_does_not_overflow(text in "([0-9]{1,10} ){2}[0-9]{1,10}(\n([0-9]{1,10} ){2}[0-9]{1,10}){0,3}", id: u32) {
            if let Some(map) = IdMap::parse(&text) {
                map.to_inside(map.root()).expect("root is mapped");
                // Extents of the kernel's do not overlap; of those here, any may be the first.
                if let Some(host) = map.to_host(id) {
                    prop_assert!(map.of_host().any(|range| range.contains(&host)));
                }
            }
        }

        #[test]
        fn there_and_back(inside in 0..1_000_000u32, host in 0..1_000_000u32, count in 1..70_000u32, at: u32) {
            let map = IdMap::parse(&format!("{inside} {host} {count}")).unwrap();
            let id = inside + at % count;
            prop_assert_eq!(map.to_inside(map.to_host(id).unwrap()), Some(id));
            prop_assert_eq!(map.to_host(inside + count), None);
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = IdMap::parse(&text);
        }
    }
}
