-- presence_go: connections are not subscribed any more.
--
-- ARGV     channel, entries
-- Reply    1

local refused = presence.open()
if refused then return refused end
for i = 2, #ARGV do presence.remove(ARGV[i]) end
presence.close()
return 1
