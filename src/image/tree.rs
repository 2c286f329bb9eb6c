//! The merged file system of an image, in memory: what files there are, not what is in them.
//!
//! Nothing is made on the host, so no path of an archive can lead out of the tree: `..` is refused, and so is an entry
//! below a symlink of its own layer. A symlink of a layer below is followed within the tree, as container engines do.

use std::collections::BTreeMap;
use std::io;

use super::archive::{Metadata, PATH_MAX, invalid};
use super::contents::Data;

/// The longest name, in bytes.
const NAME_MAX: usize = 255;
/// The most symlinks on one path, as in Linux.
const SYMLINKS_MAX: u32 = 40;

/// Which node: its index.
pub(super) type Id = usize;

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Directory(BTreeMap<Vec<u8>, Name>),
    File(Data),
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// What has a name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name {
    pub id: Id,
    /// The last layer that set it.
    layer: usize,
}

/// A file of any type. It has a name, or several, in the directories above it.
#[derive(Debug)]
pub(super) struct Node {
    pub metadata: Metadata,
    pub content: Content,
    /// How many names it has.
    pub links: u32,
}

/// What may be in a tree.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub nodes: usize,
    /// Bytes of names, link targets and extended attributes.
    pub text: usize,
}

/// All files. The root is node 0.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    limits: Limits,
    text: usize,
    /// The layer being applied.
    layer: usize,
    /// Data of files that have lost their last name.
    freed: Vec<Data>,
}

pub(super) const ROOT: Id = 0;

impl Tree {
    /// A tree with an empty root directory.
    pub fn new(limits: Limits) -> Self {
        let root = Node { metadata: implied(), content: Content::Directory(BTreeMap::new()), links: 1 };
        Self { nodes: vec![root], limits, text: 0, layer: 0, freed: vec![] }
    }

    /// Begins the layer above all before it.
    pub fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// How many nodes there have been, those without a name included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A node.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Data that no file has any more.
    pub fn take_freed(&mut self) -> Vec<Data> {
        std::mem::take(&mut self.freed)
    }

    /// Sets the metadata of the root.
    pub fn set_root(&mut self, metadata: Metadata) {
        self.nodes[ROOT].metadata = metadata;
    }

    /// The directory that `path` lies in, made with all above it where there is none, and the path's last name; `None`
    /// for the root.
    pub fn parent<'a>(&mut self, path: &'a [u8]) -> io::Result<Option<(Id, &'a [u8])>> {
        let mut names = names(path)?;
        let Some(last) = names.pop() else { return Ok(None) };
        let mut at = vec![ROOT];
        for name in names {
            let parent = *at.last().expect("the root is never popped");
            match self.child(parent, name) {
                None => {
                    let id = self.add(implied(), Content::Directory(BTreeMap::new()))?;
                    self.link(parent, name, id)?;
                    at.push(id);
                }
                Some(child) => self.enter(&mut at, child, &mut 0)?,
            }
        }
        Ok(at.pop().map(|parent| (parent, last)))
    }

    /// The directory that `path` lies in, and the path's last name; `None` if there is no such directory.
    pub fn existing_parent<'a>(&self, path: &'a [u8]) -> io::Result<Option<(Id, &'a [u8])>> {
        let mut names = names(path)?;
        let Some(last) = names.pop() else { return Ok(None) };
        let mut at = vec![ROOT];
        for name in names {
            match self.child(at[at.len() - 1], name) {
                Some(child) if self.enter(&mut at, child, &mut 0).is_ok() => {}
                _ => return Ok(None),
            }
        }
        Ok(Some((at[at.len() - 1], last)))
    }

    /// The file with this path, which a hard link names; `None` if there is none.
    pub fn find(&self, path: &[u8]) -> io::Result<Option<Id>> {
        if names(path)?.is_empty() {
            return Ok(Some(ROOT));
        }
        let parent = self.existing_parent(path)?;
        Ok(parent.and_then(|(parent, name)| self.child(parent, name)).map(|child| child.id))
    }

    /// Goes from the directory at the end of `at` into its child.
    fn enter(&self, at: &mut Vec<Id>, child: Name, symlinks: &mut u32) -> io::Result<()> {
        match &self.nodes[child.id].content {
            Content::Directory(_) => at.push(child.id),
            Content::Symlink(_) if child.layer == self.layer => {
                return Err(invalid("its path goes through a symlink of its own archive"));
            }
            Content::Symlink(target) => {
                *symlinks += 1;
                if *symlinks > SYMLINKS_MAX {
                    return Err(invalid("its path goes through too many symlinks"));
                }
                if target.starts_with(b"/") {
                    at.truncate(1);
                }
                for name in target.split(|byte| *byte == b'/') {
                    match name {
                        b"" | b"." => {}
                        b".." if at.len() == 1 => {
                            return Err(invalid("its path goes through a symlink out of the root"));
                        }
                        b".." => drop(at.pop()),
                        name => {
                            let parent = at[at.len() - 1];
                            let child = self.child(parent, name);
                            let child = child.ok_or_else(|| invalid("its path goes through a symlink to nothing"))?;
                            self.enter(at, child, symlinks)?;
                        }
                    }
                }
            }
            _ => return Err(invalid("its path goes through something that is no directory")),
        }
        Ok(())
    }

    fn child(&self, parent: Id, name: &[u8]) -> Option<Name> {
        match &self.nodes[parent].content {
            Content::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn children(&mut self, parent: Id) -> &mut BTreeMap<Vec<u8>, Name> {
        match &mut self.nodes[parent].content {
            Content::Directory(children) => children,
            _ => unreachable!("only directories are looked up as parents"),
        }
    }

    /// Puts a new file of any type at `name`, in place of what is there. A directory over a directory keeps what is in it.
    pub fn put(&mut self, parent: Id, name: &[u8], metadata: Metadata, content: Content) -> io::Result<Id> {
        let layer = self.layer;
        if let Some(Name { id, .. }) = self.child(parent, name)
            && let (Content::Directory(_), Content::Directory(_)) = (&self.nodes[id].content, &content)
        {
            self.nodes[id].metadata = metadata;
            self.children(parent).insert(name.to_vec(), Name { id, layer });
            return Ok(id);
        }
        let id = self.add(metadata, content)?;
        self.link(parent, name, id)?;
        Ok(id)
    }

    /// Gives file `id` another name, in place of what has it now.
    pub fn link(&mut self, parent: Id, name: &[u8], id: Id) -> io::Result<()> {
        self.count_text(name.len())?;
        self.nodes[id].links += 1;
        let layer = self.layer;
        if let Some(before) = self.children(parent).insert(name.to_vec(), Name { id, layer }) {
            self.unlink(before.id);
        }
        Ok(())
    }

    fn add(&mut self, metadata: Metadata, content: Content) -> io::Result<Id> {
        if self.nodes.len() >= self.limits.nodes {
            return Err(invalid(format!("there are more than {} files", self.limits.nodes)));
        }
        let xattrs: usize = metadata.xattrs.iter().map(|(key, value)| key.len() + value.len()).sum();
        self.count_text(xattrs + if let Content::Symlink(target) = &content { target.len() } else { 0 })?;
        self.nodes.push(Node { metadata, content, links: 0 });
        Ok(self.nodes.len() - 1)
    }

    fn count_text(&mut self, bytes: usize) -> io::Result<()> {
        self.text += bytes;
        if self.text <= self.limits.text {
            return Ok(());
        }
        Err(invalid(format!("names and extended attributes have more than {} bytes", self.limits.text)))
    }

    /// Takes one name from `id`; with the last one goes all that is below it.
    fn unlink(&mut self, id: Id) {
        let mut gone = vec![id];
        while let Some(id) = gone.pop() {
            let node = &mut self.nodes[id];
            node.links -= 1;
            if node.links == 0 {
                match std::mem::replace(&mut node.content, Content::Fifo) {
                    Content::Directory(children) => gone.extend(children.into_values().map(|child| child.id)),
                    Content::File(data) => self.freed.push(data),
                    _ => {}
                }
            }
        }
    }

    /// Removes what layers below have at `name`. What the layer being applied has put there stays.
    pub fn hide(&mut self, parent: Id, name: &[u8]) {
        if let Some(child) = self.child(parent, name) {
            self.hide_name(parent, name, child);
        }
    }

    /// Removes what layers below have in directory `id`.
    pub fn hide_children(&mut self, id: Id) {
        for (name, child) in self.children(id).clone() {
            self.hide_name(id, &name, child);
        }
    }

    /// Paths are short, so that this does not go deep.
    fn hide_name(&mut self, parent: Id, name: &[u8], child: Name) {
        if let Content::Directory(_) = self.nodes[child.id].content {
            self.hide_children(child.id);
            if !self.children(child.id).is_empty() {
                return;
            }
        }
        if child.layer < self.layer {
            self.children(parent).remove(name);
            self.unlink(child.id);
        }
    }
}

/// A directory that no entry describes.
fn implied() -> Metadata {
    Metadata { mode: 0o755, ..Metadata::default() }
}

/// The names on a path from the root.
fn names(path: &[u8]) -> io::Result<Vec<&[u8]>> {
    if path.len() > PATH_MAX {
        return Err(invalid(format!("its path has more than {PATH_MAX} bytes")));
    }
    // `/` alone is the root, which some builders write so.
    if path.starts_with(b"/") && path.iter().any(|byte| *byte != b'/') {
        return Err(invalid("its path is absolute"));
    }
    let names = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
    let names: Vec<_> = names.collect();
    if names.contains(&b"..".as_slice()) {
        return Err(invalid("its path has `..`"));
    }
    match names.iter().find(|name| name.len() > NAME_MAX) {
        Some(name) => Err(invalid(format!("a name has {} bytes, more than {NAME_MAX}", name.len()))),
        None => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let mut tree = Tree::new(Limits { nodes: 100, text: 1000 });
        tree.next_layer();
        tree
    }

    fn put(tree: &mut Tree, path: &str, content: Content) -> io::Result<()> {
        let (parent, name) = tree.parent(path.as_bytes())?.unwrap();
        tree.put(parent, name, Metadata::default(), content).map(|_| ())
    }

    fn hide(tree: &mut Tree, path: &str) {
        let (parent, name) = tree.parent(path.as_bytes()).unwrap().unwrap();
        tree.hide(parent, name);
    }

    fn directory() -> Content {
        Content::Directory(BTreeMap::new())
    }

    fn symlink(target: &str) -> Content {
        Content::Symlink(target.into())
    }

    fn has(tree: &Tree, path: &str) -> bool {
        tree.find(path.as_bytes()).unwrap().is_some()
    }

    #[test]
    fn directories_above_are_made() {
        let mut tree = tree();
        put(&mut tree, "./a//b/./c", Content::Fifo).unwrap();
        assert!(has(&tree, "a/b/c"));
        assert_eq!(tree.node(tree.find(b"a/b").unwrap().unwrap()).metadata.mode, 0o755);
        assert_eq!(tree.parent(b"/").unwrap(), None);
        assert_eq!(tree.parent(b"./").unwrap(), None);
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        let mut tree = tree();
        put(&mut tree, "link", symlink("/etc")).unwrap();
        put(&mut tree, "file", Content::Fifo).unwrap();
        for path in ["..", "../x", "a/../../x", "/etc/passwd", "link/passwd", "file/x", &"n".repeat(256)] {
            assert!(put(&mut tree, path, Content::Fifo).is_err(), "{path}");
        }
    }

    #[test]
    fn a_symlink_of_a_layer_below_is_followed_within_the_tree() {
        let mut tree = tree();
        put(&mut tree, "usr/lib", directory()).unwrap();
        put(&mut tree, "lib", symlink("usr/lib")).unwrap();
        put(&mut tree, "var/run", symlink("/run")).unwrap();
        put(&mut tree, "run", directory()).unwrap();
        put(&mut tree, "out", symlink("../../etc")).unwrap();
        put(&mut tree, "loop", symlink("loop")).unwrap();
        tree.next_layer();
        put(&mut tree, "lib/a", Content::Fifo).unwrap();
        put(&mut tree, "var/run/b", Content::Fifo).unwrap();
        assert!(has(&tree, "usr/lib/a") && has(&tree, "run/b"));
        for path in ["out/passwd", "loop/x"] {
            assert!(put(&mut tree, path, Content::Fifo).is_err(), "{path}");
        }
    }

    #[test]
    fn a_directory_and_a_file_replace_each_other() {
        let mut tree = tree();
        put(&mut tree, "a/b", Content::File(Data::default())).unwrap();
        tree.next_layer();
        put(&mut tree, "a", Content::Fifo).unwrap();
        assert!(!has(&tree, "a/b"));
        assert_eq!(tree.take_freed().len(), 1);
        put(&mut tree, "a", directory()).unwrap();
        put(&mut tree, "a/c", Content::Fifo).unwrap();
        put(&mut tree, "a", directory()).unwrap();
        assert!(has(&tree, "a/c"), "a directory over a directory keeps what is in it");
    }

    #[test]
    fn a_hard_link_outlives_the_file_that_it_was_made_of() {
        let mut tree = tree();
        put(&mut tree, "a", Content::File(Data::default())).unwrap();
        let id = tree.find(b"a").unwrap().unwrap();
        tree.link(ROOT, b"b", id).unwrap();
        assert_eq!(tree.node(id).links, 2);
        tree.next_layer();
        put(&mut tree, "a", Content::Fifo).unwrap();
        assert_eq!((tree.find(b"b").unwrap(), tree.node(id).links), (Some(id), 1));
        assert_eq!(tree.take_freed(), []);
        // Onto itself, and another name for what is hidden by its first.
        tree.link(ROOT, b"b", id).unwrap();
        tree.link(ROOT, b"b", id).unwrap();
        assert_eq!(tree.node(id).links, 1);
        hide(&mut tree, "b");
        assert!(has(&tree, "b"), "this layer has set it");
        tree.link(ROOT, b"c", id).unwrap();
        tree.next_layer();
        tree.link(ROOT, b"d", id).unwrap();
        for name in ["b", "c", "d"] {
            hide(&mut tree, name);
        }
        assert_eq!(["b", "c", "d"].map(|name| has(&tree, name)), [false, false, true]);
        tree.next_layer();
        hide(&mut tree, "d");
        assert_eq!(tree.take_freed().len(), 1);
    }

    #[test]
    fn what_a_layer_hides_is_not_its_own() {
        let mut tree = tree();
        put(&mut tree, "d/old", Content::Fifo).unwrap();
        put(&mut tree, "d/sub/old", Content::Fifo).unwrap();
        put(&mut tree, "e/old", Content::Fifo).unwrap();
        tree.next_layer();
        put(&mut tree, "d/new", Content::Fifo).unwrap();
        put(&mut tree, "d/sub/new", Content::Fifo).unwrap();
        let d = tree.find(b"d").unwrap().unwrap();
        tree.hide_children(d);
        hide(&mut tree, "e");
        hide(&mut tree, "missing");
        let found = ["d/old", "d/sub/old", "d/new", "d/sub/new", "e"].map(|path| has(&tree, path));
        assert_eq!(found, [false, false, true, true, false]);
    }

    #[test]
    fn there_is_an_end_to_what_an_archive_may_make() {
        let mut tree = tree();
        assert!(put(&mut tree, &"d/".repeat(101), Content::Fifo).is_err());
        let mut tree = Tree::new(Limits { nodes: 100, text: 1000 });
        let mut long = |name: &str| put(&mut tree, &name.repeat(250), Content::Fifo);
        for name in ["a", "b", "c", "d"] {
            long(name).unwrap();
        }
        assert!(long("e").is_err());
    }
}
