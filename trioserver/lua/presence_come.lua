-- presence_come: connections have subscribed, or are still there.
--
-- ARGV     channel, seconds for which the keys live on, then pairs: an entry, and the one that it
--          stands for now (of a life that is over), or nothing
-- Reply    how many different users are there

local refused = presence.open()
if refused then return refused end
for i = 3, #ARGV, 2 do presence.add(ARGV[i], ARGV[i + 1]) end
call('EXPIRE', MEMBERS, ARGV[2])
call('EXPIRE', COUNTS, ARGV[2])
presence.close()
return tonumber(call('HGET', COUNTS, 'users'))
