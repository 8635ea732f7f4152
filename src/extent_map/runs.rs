//! Runs of equal cover over numbered places: one node each, or zeros over many places.

use std::sync::Arc;

use super::Mark;

/// What covers a run.
#[derive(Debug)]
pub enum Cover<T> {
    /// Zeros, all of it.
    Zero(Mark),
    /// A node that knows more; its run is one place.
    Fine(Arc<T>),
}

impl<T> Clone for Cover<T> {
    fn clone(&self) -> Cover<T> {
        match self {
            Cover::Zero(mark) => Cover::Zero(*mark),
            Cover::Fine(node) => Cover::Fine(Arc::clone(node)),
        }
    }
}

/// The places `[start, start + count)`.
#[derive(Debug)]
pub struct Run<T> {
    pub start: u32,
    pub count: u32,
    pub cover: Cover<T>,
}

impl<T> Clone for Run<T> {
    fn clone(&self) -> Run<T> {
        Run { start: self.start, count: self.count, cover: self.cover.clone() }
    }
}

impl<T> Run<T> {
    fn behind(&self) -> u32 {
        self.start + self.count
    }
}

/// Runs in order, none empty, none overlapping; what is between them is not known here.
#[derive(Debug)]
pub struct Runs<T> {
    runs: Vec<Run<T>>,
}

impl<T> Default for Runs<T> {
    fn default() -> Runs<T> {
        Runs { runs: Vec::new() }
    }
}

impl<T> Clone for Runs<T> {
    fn clone(&self) -> Runs<T> {
        Runs { runs: self.runs.clone() }
    }
}

impl<T> Runs<T> {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub fn len(&self) -> usize {
        self.runs.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Run<T>> {
        self.runs.iter()
    }

    /// The run that holds `place`, or the first behind it.
    pub fn from(&self, place: u32) -> Option<&Run<T>> {
        self.runs.get(self.index_of(place))
    }

    /// Bytes of memory of the runs themselves.
    pub fn memory_bytes(&self) -> u64 {
        // The two counters of the shared node, and the vector.
        (16 + size_of::<Runs<T>>() + self.runs.capacity() * size_of::<Run<T>>()) as u64
    }

    /// The index of the run that holds `place`, or else of the first behind it.
    fn index_of(&self, place: u32) -> usize {
        self.runs.partition_point(|run| run.behind() <= place)
    }

    fn insert(&mut self, index: usize, run: Run<T>) {
        // A little room only: the map's memory is counted per extent.
        if self.runs.len() == self.runs.capacity() {
            self.runs.reserve_exact((self.runs.len() / 4).clamp(1, 4096));
        }
        self.runs.insert(index, run);
    }

    /// The node at `place`, for changing; made where there is none, from the zeros that cover the
    /// place, if any.
    pub fn fine_mut(&mut self, place: u32, make: impl FnOnce(Option<Mark>) -> T) -> &mut T
    where
        T: Clone,
    {
        let mut index = self.index_of(place);
        let covering = self.runs.get(index).filter(|run| run.start <= place);
        match covering.map(|run| (&run.cover, run.start, run.behind())) {
            Some((Cover::Fine(_), ..)) => {}
            Some((&Cover::Zero(mark), start, behind)) => {
                let made = Cover::Fine(Arc::new(make(Some(mark))));
                self.runs[index] = Run { start: place, count: 1, cover: made };
                if place + 1 < behind {
                    let count = behind - place - 1;
                    self.insert(
                        index + 1,
                        Run { start: place + 1, count, cover: Cover::Zero(mark) },
                    );
                }
                if start < place {
                    let count = place - start;
                    self.insert(index, Run { start, count, cover: Cover::Zero(mark) });
                    index += 1;
                }
            }
            None => {
                let made = Cover::Fine(Arc::new(make(None)));
                self.insert(index, Run { start: place, count: 1, cover: made });
            }
        }
        match &mut self.runs[index].cover {
            Cover::Fine(node) => Arc::make_mut(node),
            Cover::Zero(_) => unreachable!("a node was put there"),
        }
    }

    /// Takes all cover off the places `[from, to)`.
    pub fn clear(&mut self, from: u32, to: u32, freed: &mut Vec<Run<T>>) {
        if from >= to {
            return;
        }
        let first = self.index_of(from);
        let behind = first + self.runs[first..].partition_point(|run| run.start < to);
        if first == behind {
            return;
        }
        let edge = |start: u32, end: u32, cover: &Cover<T>| match cover {
            Cover::Zero(mark) if start < end => {
                Some(Run { start, count: end - start, cover: Cover::Zero(*mark) })
            }
            _ => None,
        };
        let left = edge(self.runs[first].start, from, &self.runs[first].cover);
        let last = &self.runs[behind - 1];
        let right = edge(to, last.behind(), &last.cover);
        let kept = left.into_iter().chain(right);
        freed.extend(self.runs.splice(first..behind, kept));
    }

    /// Puts zeros over the places `[from, to)`, which nothing covers.
    pub fn cover(&mut self, from: u32, to: u32, mark: Mark) {
        let index = self.index_of(from);
        debug_assert!(self.runs.get(index).is_none_or(|run| to <= run.start), "covered already");
        self.insert(index, Run { start: from, count: to - from, cover: Cover::Zero(mark) });
    }

    /// Keeps the runs that `keep` says, which may change them.
    pub fn retain(&mut self, freed: &mut Vec<Run<T>>, mut keep: impl FnMut(&mut Cover<T>) -> bool) {
        freed.extend(self.runs.extract_if(.., |run| !keep(&mut run.cover)));
        if self.runs.len() < self.runs.capacity() / 2 {
            self.runs.shrink_to_fit();
        }
    }
}
