//! An operator takes a group back to where it was: a request of a line like any other, which makes
//! of the volumes what an image there shows.

use tidelog::group::Point;
use tidelog::units::Lsn;

use super::node::contents;
use super::oracle::{Request, What};
use super::world::World;

impl World {
    /// Takes a group back to a moment that its log covers.
    pub fn rewind(&mut self, node: usize, group: usize) {
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        let waits = found.waits_because().is_some() || found.log_full().is_some();
        if !self.nodes[node].serves(group) || waits {
            return;
        }
        let at = found.positions();
        let from = at.horizon.max(self.groups[group].made_at);
        if from >= at.head {
            return;
        }
        let lsn = Lsn(from.0 + self.chance.below(at.head.bytes_since(from) + 1));
        let Ok(image) = found.open_image(&Point::Lsn(lsn), None, "rewind", None) else { return };
        let to = image.position().lsn;
        let bytes = contents(&*image);
        let closed = found.close_this_image(&image);
        let (Ok(bytes), Ok(())) = (bytes, closed) else { return };
        for host in self.hosts.iter_mut().filter(|host| host.group == group) {
            host.leave(node);
        }
        let Some(line) = self.line_here(node, group) else { return };
        let oracle = &mut self.groups[group].oracle;
        let held = oracle.read(&bytes).expect("an image");
        let id = oracle.send(Request { fua: true, ..Request::new(What::Rewind) });
        let result = found.rewind(&Point::Lsn(to), false);
        let name = self.nodes[node].name.clone();
        self.say(format_args!("{name} takes group {group} back to {to}: {result:?}"));
        let oracle = &mut self.groups[group].oracle;
        if result.is_err() {
            // It may be in the log all the same.
            let side = oracle.fork(node, line);
            oracle.go_back(side, id, held);
            return self.coverage.add("rewinds refused", 1);
        }
        oracle.go_back(line, id, held);
        oracle.answer(id);
        let end = oracle.end_of(line);
        let copy = self.nodes[node].copies.get_mut(&group).expect("it runs");
        (copy.sure, copy.durable) = (vec![end], vec![end]);
        self.coverage.add("rewinds", 1);
        let images = self.nodes.iter().filter_map(|node| node.copies.get(&group));
        let beside = images.filter(|copy| !copy.images.is_empty()).count();
        self.coverage.add("rewinds beside open images", beside as u64);
        if self.nodes[node].disk.has_power() {
            self.note_sure(node, group);
            self.check_images(node, group);
        }
    }
}
