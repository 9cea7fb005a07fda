//! Reading and writing the few elements of libvirt's XML that matter here.

use roxmltree::{Document, Node};

use super::LibvirtError;

/// Parses an answer whose outermost element must be `root`, and takes out of it what is asked for.
pub(super) fn read<T>(
    text: &str,
    command: &str,
    root: &str,
    take: impl FnOnce(Node<'_, '_>) -> Option<T>,
) -> Result<T, LibvirtError> {
    let unusable = |why: String| LibvirtError::Answer { command: command.into(), why };
    let document = Document::parse(text).map_err(|e| unusable(format!("it is not XML ({e})")))?;
    let element = document.root_element();
    if !element.has_tag_name(root) {
        return Err(unusable(format!("it is not a <{root}>")));
    }
    take(element).ok_or_else(|| unusable(format!("its <{root}> lacks what it must have")))
}

/// The first child element of that name.
pub(super) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// The text of the first child element of that name.
pub(super) fn child_text<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name)?.text().map(str::trim).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use reseal_qemu::xml::escape;

    use super::*;

    #[test]
    fn what_is_escaped_reads_back() {
        let hostile = "a'/><disk name=\"b\"&amp;\n\t<ü>";
        let text = format!("<r x='{0}'><t>{0}</t></r>", escape(hostile));
        let read = read(&text, "test", "r", |root| {
            assert_eq!(child_text(root, "t"), Some(hostile));
            root.attribute("x").map(str::to_owned)
        });
        assert_eq!(read.unwrap(), hostile);
    }

    #[test]
    fn what_is_not_expected_is_refused() {
        let entities = "<!DOCTYPE r [<!ENTITY a 'aaaa'>]><r>&a;</r>";
        for text in ["", "<r>", "<q/>", entities] {
            assert!(read(text, "test", "r", |_| Some(())).is_err(), "{text}");
        }
        assert!(read("<r/>", "test", "r", |root| child_text(root, "t").map(str::to_owned)).is_err());
    }
}
