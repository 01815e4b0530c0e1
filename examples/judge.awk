# Judges answers against the truth, one line each; see external_program.py.
# "truth 7210..." sets the digits that are right; any other line is one member's answers, and gets
# the share of them that is right.
$1 == "truth" { truth = $2; next }
{
    right = 0
    for (i = 1; i <= length(truth); i++) right += substr($1, i, 1) == substr(truth, i, 1)
    print right / length(truth)
    fflush()
}
