//! What a node calls unchanged since a position of the primary is so, whether it has been there or
//! not: a backup of either node takes it over from one of the other.

use std::cell::{Cell, RefCell};

use super::resync::all;
use super::*;

/// Positions that are remembered, each with a copy of all volumes.
const POSITIONS: usize = 8;

/// A position, and what each volume had there.
type Known = (Lsn, Vec<(Volume, Vec<u8>)>);

/// What the primary was at some of its positions.
#[derive(Default)]
pub(super) struct Past {
    known: RefCell<Vec<Known>>,
    noted: Cell<usize>,
}

impl Past {
    /// The primary as it is now, in the place of what was noted longest ago.
    pub(super) fn note(&self, primary: &Group) {
        let mut known = self.known.borrow_mut();
        let now = (primary.positions().request_end, all(primary));
        let noted = self.noted.replace(self.noted.get() + 1);
        if known.len() < POSITIONS {
            known.push(now);
        } else {
            known[noted % POSITIONS] = now;
        }
    }

    /// Asks a node what has changed since each.
    pub(super) fn check(&self, group: &Group, what: &str) {
        let image = group.open_image(&Point::Now, None, "dated", None).unwrap();
        let at = image.position().lsn;
        for (since, volumes) in self.known.borrow().iter().filter(|(since, _)| *since <= at) {
            for (volume, before) in volumes {
                let number = volume.number;
                let Some(now) = image.volumes().into_iter().find(|now| now.number == number) else {
                    continue;
                };
                let bytes = before.len().min(now.size_bytes as usize);
                let mut now = read(&*image, number, 0, bytes);
                for (offset, length) in image.changed_since(number, *since).unwrap() {
                    let end = bytes.min((offset + length) as usize);
                    let range = end.min(offset as usize)..end;
                    now[range.clone()].copy_from_slice(&before[range]);
                }
                let wrong = now.iter().zip(before).position(|(now, before)| now != before);
                assert_eq!(wrong, None, "{what}: volume {number}, at {at}, since {since}");
            }
        }
        group.close_this_image(&image).unwrap();
    }
}
