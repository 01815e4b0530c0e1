# Scores answers against the labels; see external_program.py.
# "truth 7210..." sets the labels; any other line holds one member's answers, whose score is the
# share that is right.
$1 == "truth" { truth = $2; next }
{
    right = 0
    for (i = 1; i <= length(truth); i++) right += substr($1, i, 1) == substr(truth, i, 1)
    print right / length(truth)
    fflush()
}
