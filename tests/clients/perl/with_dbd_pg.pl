# DBD::Pg: the argument is pg_server_prepare (0 or 1).
use strict;
use warnings;
use DBI;
use Time::HiRes 'usleep';
$| = 1;
my ($run, $number, $count, @ids) = ($ENV{RUN}, $ENV{WORKER}, 0);
my $connect = sub {
    my $db = DBI->connect("dbi:Pg:host=$ENV{PGHOST};port=$ENV{PGPORT};dbname=$ENV{PGDATABASE}",
        $ENV{PGUSER}, $ENV{PGPASSWORD}, {RaiseError => 1, PrintError => 0, AutoCommit => 1});
    $db->{pg_server_prepare} = $ARGV[0];
    return $db;
};
my $db = $connect->();
sub id { push @ids, $number * 1_000_000 + ++$count; return $ids[-1] }
sub right { die "WRONG $_[0] instead of $_[1]\n" if $_[0] ne $_[1] }
my $insert = sub { $db->do("INSERT INTO written VALUES (?, ?, 'x')", undef, $run, id()) };
my $long = $db->prepare("SELECT ?::int + 1");
my @ops = (
    auto => $insert,
    transaction => sub {
        $db->begin_work;
        my $statement = $db->prepare("INSERT INTO written VALUES (?, ?, 'x')");
        $statement->execute($run, id());
        $db->pg_savepoint('s');
        $statement->execute($run, id());
        $db->pg_release('s');
        undef $statement;
        $db->commit;
    },
    read => sub {
        for my $wanted (0 .. 2) {
            $long->execute($wanted);
            right($long->fetchrow_array, $wanted + 1);
            my $other = $db->prepare("SELECT ?::int + $wanted");
            $other->execute($wanted);
            right($other->fetchrow_array, 2 * $wanted);
        }
    },
    copy_in => sub {
        $db->do("COPY written (run, id) FROM STDIN");
        $db->pg_putcopydata("$run\t" . id() . "\n");
        usleep(20_000);
        $db->pg_putcopydata("$run\t" . id() . "\n");
        right($db->pg_putcopyend, 1);
    },
    copy_out => sub {
        $db->do("COPY (SELECT generate_series(1, 500)) TO STDOUT");
        my ($seen, $row) = (0, '');
        $seen++ while $db->pg_getcopydata($row) >= 0;
        right($seen, 500);
    },
    script => sub { $db->do("INSERT INTO written VALUES ($run, " . id() . "); SELECT 1") },
);
until (-e $ENV{STOP}) {
    for (my $n = 0; $n < @ops; $n += 2) {
        last if -e $ENV{STOP};
        @ids = ();
        my $told = 'ok ';
        if (!eval { $ops[$n + 1]->(); 1 }) {
            my ($error, $state) = ($@, $DBI::state || '-');
            $told = $error =~ /^WRONG (.*)/ ? "wrong $1" : "error $state ";
            my $ids = join(',', @ids) || '-';
            $told .= "$ids $error" if $told =~ /^error/;
            eval { $db->rollback unless $db->{AutoCommit} };
            if (!$db->ping) {
                $db = $connect->();
                $long = $db->prepare("SELECT ?::int + 1");
                $told .= ' / the connection was lost';
            }
        } else {
            $told .= join(',', @ids) || '-';
        }
        $told =~ tr/\n/ /;
        print "$number $ops[$n] $told\n";
        usleep(5_000);
    }
}
