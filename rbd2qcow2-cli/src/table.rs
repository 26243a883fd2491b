//! A table for people: columns as wide as their widest cell.

use std::io::{self, Write};

use console::{Alignment, measure_text_width, pad_str};

/// What separates columns.
const GAP: &str = "  ";

/// A column's heading, and on which side its cells are filled up.
pub type Column = (&'static str, Alignment);

/// Writes a heading and the rows, which have as many cells as there are columns.
///
/// # Errors
/// What writing met.
pub fn write<const N: usize>(
    output: &mut impl Write,
    columns: &[Column; N],
    rows: &[[String; N]],
) -> io::Result<()> {
    let mut widths = columns.map(|(heading, _)| measure_text_width(heading));
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = measure_text_width(cell).max(*width);
        }
    }
    let headings = columns.map(|(heading, _)| heading.to_owned());
    for row in std::iter::once(&headings).chain(rows) {
        let cells: Vec<_> = row
            .iter()
            .zip(columns.iter().zip(widths))
            .map(|(cell, ((_, alignment), width))| pad_str(cell, width, *alignment, None))
            .collect();
        writeln!(output, "{}", cells.join(GAP).trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_the_script() {
        let columns = [("IMAGE", Alignment::Left), ("SIZE", Alignment::Right), ("PARENT", Alignment::Left)];
        let rows = [
            ["größe".to_owned(), "1 B".to_owned(), String::new()],
            ["a long name".to_owned(), "10 GiB".to_owned(), "x".to_owned()],
            ["虚拟机".to_owned(), String::new(), "y".to_owned()],
        ];
        let mut text = Vec::new();
        write(&mut text, &columns, &rows).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "IMAGE          SIZE  PARENT\n\
             größe           1 B\n\
             a long name  10 GiB  x\n\
             虚拟机               y\n"
        );
    }
}
