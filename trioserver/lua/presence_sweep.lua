-- presence_sweep: removes what dead workers have left behind; some of it.
--
-- ARGV     channel, where to begin (as ZRANGEBYLEX wants it), entries to look at, lives that are
--          over
-- Reply    where to go on, or nothing if none of these lives has an entry any more

local refused = presence.open()
if refused then return refused end
local over, any = {}, false
for i = 4, #ARGV do
  over[ARGV[i]] = true
  any = any or call('HEXISTS', COUNTS, ARGV[i]) == 1
end
if not any then return '' end
local most = tonumber(ARGV[3])
local page = call('ZRANGEBYLEX', MEMBERS, ARGV[2], '+', 'LIMIT', 0, most)
for i = 1, #page do
  if over[life_of(page[i])] then presence.remove(page[i]) end
end
presence.close()
return #page == most and '(' .. page[most] or ''
