import pyarrow.parquet
import pytest

from rasengan import UserError, data, demo, metadata


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.csv", "\n\nname,text\n1.png,a", "metadata.csv, line 3: no column is file_name, but name, text"),
        ("metadata.csv", "file_name,text\n1.png," + "x" * 200_000, None),
        ("metadata.csv", 'file_name,text\n1.png,"a,\nb"\n\n', None),
        (
            "metadata.csv",
            "file_name,text\n\n",
            "line 1: the columns' names are there, and no line for a picture below",
        ),
        (
            "metadata.csv",
            'file_name,text\n1.png,"a\nb"\n2.png,a, b\n',
            "line 4: there are 3 values for 2 columns. Put",
        ),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "a", "text": "b"}', "line 1: text stands there twice"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "\\ud83d"}', r"line 1: '\ud83d' is half a character"),
        ("metadata.jsonl", '{"file_name": "a::b.png", "text": "a"}', "line 1: a file's name holds ::, which marks"),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "text": ' + "9" * 5000 + "}",
            "metadata.jsonl, line 1: this cannot",
        ),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "a"}\n', None),
        ("metadata.jsonl", '{"file_name": 1, "text": "a"}', "line 1: file_name is a number, not the name of a file"),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "text": ["a", 5]}',
            "line 1: text is a list of values of diff",
        ),
        ("metadata.parquet", "PAR", "metadata.parquet is no parquet file: "),
    ],
)
def test_where_metadata_are_wrong_is_said(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    found = metadata.find_fault([tmp_path / name])
    assert (found is None) if said is None else (said in found)


def test_a_table_without_rows_is_told_of(tmp_path):
    names = ("file_name", "text")
    pyarrow.parquet.write_table(
        pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in names}), tmp_path / "metadata.parquet"
    )
    demo.draw_picture_set(tmp_path, count=1)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"metadata\.parquet has no rows\. Write one for each picture"):
        data.load_pictures(None, None, str(tmp_path), "image", "text", str(tmp_path / "cache"))
