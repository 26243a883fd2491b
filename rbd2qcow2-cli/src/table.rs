//! A table for people: columns as wide as their widest cell.

use std::io::{self, Write};

use console::{Alignment, measure_text_width, pad_str};

/// What separates columns.
const GAP: &str = "  ";

/// A column's heading, and on which side its cells are filled up.
pub type Column = (&'static str, Alignment);

/// What stands in a table.
#[derive(Clone, Debug)]
pub enum Line<const N: usize> {
    /// A cell for each column.
    Cells([String; N]),
    /// Whatever is not told in columns. It makes none of them wider.
    Text(String),
}

/// Writes a heading and the lines.
///
/// # Errors
/// What writing met.
pub fn write<const N: usize>(
    output: &mut impl Write,
    columns: &[Column; N],
    lines: &[Line<N>],
) -> io::Result<()> {
    let headings = Line::Cells(columns.map(|(heading, _)| heading.to_owned()));
    let lines = std::iter::once(&headings).chain(lines);
    let mut widths = [0; N];
    for line in lines.clone() {
        let Line::Cells(cells) = line else { continue };
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = measure_text_width(cell).max(*width);
        }
    }
    for line in lines {
        match line {
            Line::Text(text) => writeln!(output, "{text}")?,
            Line::Cells(cells) => {
                let cells: Vec<_> = cells
                    .iter()
                    .zip(columns.iter().zip(widths))
                    .map(|(cell, ((_, alignment), width))| pad_str(cell, width, *alignment, None))
                    .collect();
                writeln!(output, "{}", cells.join(GAP).trim_end())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_the_script() {
        let columns = [("IMAGE", Alignment::Left), ("SIZE", Alignment::Right), ("PARENT", Alignment::Left)];
        let cells = |cells: [&str; 3]| Line::Cells(cells.map(str::to_owned));
        let rows = [
            cells(["größe", "1 B", ""]),
            Line::Text("Something that is far longer than any cell".to_owned()),
            cells(["a long name", "10 GiB", "x"]),
            cells(["虚拟机", "", "y"]),
        ];
        let mut text = Vec::new();
        write(&mut text, &columns, &rows).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "IMAGE          SIZE  PARENT\n\
             größe           1 B\n\
             Something that is far longer than any cell\n\
             a long name  10 GiB  x\n\
             虚拟机               y\n"
        );
    }
}
