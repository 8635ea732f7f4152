//! Which records make up the image at a position, once the log has gone back: pure.
//!
//! A rewind is a record too, at `at`: behind it the image is what it was at `to`. The log itself
//! goes on in one line, and every position in it stays readable; but the records that an image is
//! made of are a *path* through it. Without rewinds that is everything up to the image; with one,
//! it is the path to where the rewind goes back, and what follows the rewind:
//!
//! ```text
//! log    ----a----x----b----[rewind to x]----c----
//! path                                            to c: (0, x] and (rewind, c]; to b: (0, b]
//! ```
//!
//! A rewind may go to a point inside of what an earlier one left behind, so paths form a tree: two
//! of them are the same up to where they fork, and share nothing behind it.

use crate::units::Lsn;

/// One rewind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rewind {
    /// Where its record begins.
    pub at: Lsn,
    /// Where its record ends.
    pub end: Lsn,
    /// The end of a request before it: the image behind the record is the one there.
    pub to: Lsn,
}

/// Records that end in `(from, to]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Behind this.
    pub from: Lsn,
    /// Up to this.
    pub to: Lsn,
}

/// The rewinds of a log from some position on, in order; none goes back behind that.
///
/// Positions are ends of requests, so that none lies inside of a rewind's record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rewinds(Vec<Rewind>);

impl Rewinds {
    /// Adds the next one.
    pub(super) fn push(&mut self, rewind: Rewind) {
        assert!(rewind.to <= rewind.at && rewind.at < rewind.end, "{rewind:?}");
        assert!(self.0.last().is_none_or(|last| last.end <= rewind.at), "{rewind:?} comes late");
        self.0.push(rewind);
    }

    /// Forgets those that a fold has passed.
    pub(super) fn forget_below(&mut self, horizon: Lsn) {
        self.0.retain(|rewind| rewind.at >= horizon);
    }

    /// Forgets those behind an end of the log.
    pub(super) fn cut(&mut self, end: Lsn) {
        self.0.retain(|rewind| rewind.at < end);
    }

    /// Where they go back to.
    pub(super) fn targets(&self) -> impl Iterator<Item = Lsn> + '_ {
        self.0.iter().map(|rewind| rewind.to)
    }

    /// The records that make up the image at a position, in order.
    pub(super) fn path(&self, position: Lsn) -> Vec<Span> {
        let mut spans = Vec::new();
        let (mut to, mut rest) = (position, &self.0[..]);
        loop {
            rest = &rest[..rest.partition_point(|rewind| rewind.at < to)];
            let Some((last, before)) = rest.split_last() else { break };
            spans.push(Span { from: last.at, to });
            (to, rest) = (last.to, before);
        }
        spans.push(Span { from: Lsn::ZERO, to });
        spans.reverse();
        spans
    }

    /// The last position that the images at two positions have in common.
    pub(super) fn fork(&self, one: Lsn, other: Lsn) -> Lsn {
        let mut common = Lsn::ZERO;
        for (one, other) in self.path(one).into_iter().zip(self.path(other)) {
            if one.from != other.from {
                break;
            }
            common = one.to.min(other.to);
            if one.to != other.to {
                break;
            }
        }
        common
    }

    /// Whether the image at `of` has everything that the one at an earlier `position` has, below
    /// what came later.
    pub(super) fn is_on_path(&self, position: Lsn, of: Lsn) -> bool {
        position == Lsn::ZERO
            || self.path(of).iter().any(|span| span.from < position && position <= span.to)
    }

    /// Whether a position lies in what a rewind has left behind: a base may not stop there, since
    /// images in front of it and behind it share less than what it holds.
    pub(super) fn left_behind(&self, position: Lsn) -> bool {
        self.over(position).is_some()
    }

    fn over(&self, position: Lsn) -> Option<&Rewind> {
        self.0.iter().find(|rewind| rewind.to < position && position < rewind.end)
    }

    /// The nearest position at or before one where a base may stop.
    pub(super) fn stop_before(&self, position: Lsn) -> Lsn {
        let mut stop = position;
        while let Some(rewind) = self.over(stop) {
            stop = rewind.to;
        }
        stop
    }

    /// The nearest position at or behind one where a base may stop.
    pub(super) fn stop_behind(&self, position: Lsn) -> Lsn {
        let mut stop = position;
        while let Some(rewind) = self.over(stop) {
            stop = rewind.end;
        }
        stop
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// A record of ten bytes: it adds its own position to the image, or goes back to the end of an
    /// earlier one.
    type Program = Vec<Option<usize>>;

    fn program() -> impl Strategy<Value = Program> {
        prop::collection::vec(
            prop_oneof![3 => Just(None), 1 => (0..40_usize).prop_map(Some)],
            1..40,
        )
    }

    /// The rewinds of a program; and the plain model: at the end of each record, all records that
    /// its image is made of, in order.
    fn play(program: &Program) -> (Rewinds, BTreeMap<Lsn, Vec<Lsn>>) {
        let mut rewinds = Rewinds::default();
        let mut images = BTreeMap::from([(Lsn(0), Vec::new())]);
        let mut now: Vec<Lsn> = Vec::new();
        for (index, record) in program.iter().enumerate() {
            let (at, end) = (Lsn(index as u64 * 10), Lsn(index as u64 * 10 + 10));
            match record {
                None => now.push(end),
                Some(back) => {
                    let to = Lsn((back % (index + 1)) as u64 * 10);
                    rewinds.push(Rewind { at, end, to });
                    now = images[&to].clone();
                }
            }
            images.insert(end, now.clone());
        }
        (rewinds, images)
    }

    proptest! {
        #[test]
        fn paths_and_forks_are_those_of_the_plain_model(program in program()) {
            let (rewinds, images) = play(&program);
            let data: Vec<Lsn> = program.iter().enumerate()
                .filter(|(_, record)| record.is_none())
                .map(|(index, _)| Lsn(index as u64 * 10 + 10))
                .collect();
            for (position, image) in &images {
                let path = rewinds.path(*position);
                let made_of: Vec<Lsn> = path.iter()
                    .flat_map(|span| {
                        data.iter().filter(|end| span.from < **end && **end <= span.to)
                    })
                    .copied()
                    .collect();
                prop_assert_eq!(&made_of, image, "path to {}", position);
                for (other, theirs) in &images {
                    let fork = rewinds.fork(*position, *other);
                    let common = image.iter().zip(theirs).take_while(|(a, b)| a == b).count();
                    let shared = image.iter().filter(|end| **end <= fork).count();
                    prop_assert_eq!(shared, common, "{} and {} at {}", position, other, fork);
                    prop_assert_eq!(fork, rewinds.fork(*other, *position));
                    if rewinds.is_on_path(*other, *position) && other <= position {
                        prop_assert!(image.starts_with(theirs), "{} of {}", other, position);
                    }
                }
            }
        }

        /// What makes a fold right: every image behind a stop has all of the image at the stop, and
        /// nothing else from before it.
        #[test]
        fn every_image_behind_a_stop_continues_it(program in program(), at in 0..400_u64) {
            let (rewinds, images) = play(&program);
            let last = *images.keys().last().unwrap();
            let at = Lsn(at.min(last.0));
            for stop in [rewinds.stop_before(at), rewinds.stop_behind(at)] {
                prop_assert!(!rewinds.left_behind(stop));
                let stop = Lsn(stop.0 / 10 * 10);
                for (_, image) in images.range(stop..) {
                    let before: Vec<Lsn> =
                        image.iter().filter(|end| **end <= stop).copied().collect();
                    prop_assert_eq!(&before, &images[&stop]);
                    prop_assert!(image.starts_with(&before));
                }
                // And so with those alone that a fold up to there leaves.
                let mut left = rewinds.clone();
                left.forget_below(stop);
                for (position, image) in images.range(stop..) {
                    let behind = |spans: Vec<Span>| -> Vec<Span> {
                        spans.into_iter()
                            .filter(|span| span.to > stop)
                            .map(|span| Span { from: span.from.max(stop), ..span })
                            .collect()
                    };
                    prop_assert_eq!(
                        behind(left.path(*position)), behind(rewinds.path(*position)),
                        "{:?}", image
                    );
                }
            }
            prop_assert!(rewinds.stop_before(at) <= at && at <= rewinds.stop_behind(at));
        }
    }

    #[test]
    fn going_back_to_before_a_rewind_undoes_it() {
        let mut rewinds = Rewinds::default();
        rewinds.push(Rewind { at: Lsn(100), end: Lsn(110), to: Lsn(40) });
        rewinds.push(Rewind { at: Lsn(150), end: Lsn(160), to: Lsn(100) });
        let span = |from, to| Span { from: Lsn(from), to: Lsn(to) };
        assert_eq!(rewinds.path(Lsn(150)), [span(0, 40), span(100, 150)]);
        assert_eq!(rewinds.path(Lsn(200)), [span(0, 100), span(150, 200)]);
        assert_eq!(rewinds.fork(Lsn(150), Lsn(200)), Lsn(40));
        assert_eq!(
            (rewinds.stop_before(Lsn(155)), rewinds.stop_behind(Lsn(50))),
            (Lsn(40), Lsn(160))
        );
    }
}
